"""A block of faults, which ``test_evidence`` copies beside the others: no run has it otherwise."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from gpu.case import Case, Emit, Settings
from gpu.child import end_with_parent

NAME = "planted"
WEIGHT = 4.0
FOREVER = "EVIDENCE_FOREVER"  # a file in which the case that never ends writes who it is


def cases(settings: Settings) -> list[Case]:
    if FOREVER in os.environ:
        return [Case(NAME, "forever", seconds=1000.0)]
    names = ("before", "segfault", "after", "exit", "exception", "library", "dead GPU", "behind")
    return [
        Case(NAME, "hang", seconds=2.0),
        *(Case(NAME, name, seconds=30.0, shard="one") for name in names),
        Case(NAME, "wrong", "cpu", "float32", seconds=60.0, shard="one"),
        Case(NAME, "graph", needs_cuda=True),
    ]


def PARALLEL(settings: Settings) -> int:
    return 2


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import attnpool_kernels

    emit({"what": "who", "pid": os.getpid(), "package": attnpool_kernels.__file__})
    if case.name == "before":
        emit({"what": "network"} | network())
    elif case.name == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif case.name == "exit":
        os._exit(7)
    elif case.name == "exception":
        raise ValueError("planted")
    elif case.name == "library":
        import no_such_library  # noqa: F401
    elif case.name == "dead GPU":
        from gpu import child

        child._sick = lambda: " [sticky: planted]"
        raise RuntimeError("CUDA error: planted")
    elif case.name == "wrong":
        wrong(settings, emit)
    elif case.name in ("hang", "forever"):
        other = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1000)"], preexec_fn=end_with_parent
        )
        emit({"what": "other", "pid": other.pid})
        if path := os.environ.get(FOREVER):
            with open(path, "w") as file:
                file.write(f"{os.getpid()} {other.pid}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(0.01)


def network() -> dict[str, Any]:
    """Which interfaces there are, and what becomes of a connection."""
    with open("/proc/net/dev") as file:
        interfaces = [line.split(":")[0].strip() for line in file.readlines()[2:]]
    try:
        socket.create_connection(("192.0.2.1", 9), timeout=0.5).close()
    except OSError as error:
        return {"interfaces": interfaces, "text": str(error)}
    return {"interfaces": interfaces, "text": "connected"}


def wrong(settings: Settings, emit: Emit) -> None:
    """One percent too much from one kernel, judged by the block that judges all of them."""
    from attnpool_kernels import autograd
    from gpu.blocks import correctness

    passes = autograd.CALLS["attnpool"]

    def forward(*arguments):
        out, lse = passes.forward(*arguments)
        return out * 1.01, lse

    autograd.CALLS["attnpool"] = passes._replace(forward=forward)
    correctness.run(Case("correctness", "molecules", "cpu", "float32"), settings, emit)
