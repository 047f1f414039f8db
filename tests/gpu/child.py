"""The process that runs cases: tells its parent through a pipe what happens, line by line.

Lines are JSON with "event": "ready" (imports are done), "begin", "row" and "end". After an error
on CUDA the device is asked whether it still answers; where it does not, the process ends and its
parent goes on in a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import math
import os
import signal
import sys
import time
import traceback
from typing import Any

from .case import Case, Outcome, unpack

LONGEST = 2000  # characters of an error in a row


def main(pipe: int, parent: int) -> int:
    end_with_parent()
    if os.getppid() != parent:
        return 1
    os.set_inheritable(pipe, False)

    def tell(event: str, **facts: Any) -> None:
        line = json.dumps({"event": event, **_plain(facts)}, allow_nan=False) + "\n"
        data = line.encode()
        while data:
            data = data[os.write(pipe, data) :]

    settings, cases = unpack(sys.stdin.read())
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tell("ready", versions=versions())
    for case in cases:
        tell("begin", key=case.key)
        began = time.perf_counter()
        status, text = _run(case, settings, lambda row: tell("row", row=row | _card()))
        sick = _sick() if status in ("failed", "crashed", "wrong") else ""
        seconds = time.perf_counter() - began
        tell("end", status=status, text=text + sick, seconds=seconds, sick=bool(sick), **_card())
        if sick:
            return 1
    return 0


def _run(case: Case, settings: Any, emit: Any) -> tuple[str, str]:
    try:
        module = importlib.import_module(f"gpu.blocks.{case.block}")
        module.run(case, settings, emit)
    except Outcome as outcome:
        return outcome.status, str(outcome)[:LONGEST]
    except ModuleNotFoundError as error:
        return "missing", str(error)[:LONGEST]
    except Exception as error:
        from attnpool_kernels import BackendError

        if isinstance(error, BackendError):
            return "refused", str(error).splitlines()[0][:LONGEST]
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"[:LONGEST]
    return "ok", ""


def _sick() -> str:
    """Why the GPU answers no more in this process; "" where it does or was not used."""
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception as error:
        return f" [sticky: {str(error).splitlines()[0]:.200}]"
    return ""


def _card() -> dict[str, str]:
    """The name of the GPU, once something has used it: asking would start CUDA."""
    import torch

    try:
        return {"card": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}
    except Exception:
        return {}


def versions() -> dict[str, str | None]:
    import torch

    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    for name in ("triton", "xformers", "flash_attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _plain(x: Any) -> Any:
    """JSON knows no infinity, and rows may hold numbers of torch."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return repr(x)
    if x is None or isinstance(x, (str, bool, int, float)):
        return x
    return str(x)


def end_with_parent() -> None:
    """Linux kills this process when its parent ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
