"""compute-sanitizer's four tools over all passes on small batches, side by side.

Only our kernels are watched, except by initcheck: what an unwatched kernel writes would count as
never written. Inputs come by copies of the driver for the same reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.case import ROOT, Case, Emit, Outcome, Settings
from gpu.child import end_with_parent

NAME = "sanitizers"
WEIGHT = 6.0
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BACKENDS = ("cuda", "triton")
OWN = {"cuda": "attnpool", "triton": "_kernel"}  # what the names of our kernels hold
BATCHES = ("empty among them", "four seeds", "bias", "dropout", "wide")
DTYPES = ("bfloat16", "float32")
FOUND = 9  # exit code of the tool where it has found something


def PARALLEL(settings: Settings) -> int:
    return min(len(TOOLS) * len(BACKENDS), max(1, settings.cores // 2))


def cases(settings: Settings) -> list[Case]:
    return [
        Case(
            NAME,
            tool,
            backend,
            needs_cuda=True,
            seconds=240.0,
            after="prewarm" if backend == "triton" else "",
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for backend in BACKENDS
        if settings.wants(backend)
        for tool in TOOLS
    ]


def run(case: Case, settings: Settings, emit: Emit) -> None:
    tool = sanitizer()
    command = [tool, "--tool", case.name, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    if case.name == "memcheck":
        command += ["--padding", "512"]
    if case.name != "initcheck":
        command += only(OWN[case.backend], options_of(tool))
    program = [sys.executable, "-c", PROGRAM, case.backend, settings.device]
    limit = max(5.0, min(case.seconds, settings.left()) - 5.0)
    code, text = output_of([*command, *program], limit)
    log = settings.out / "log" / f"sanitizers_{case.name}_{case.backend}.txt"
    log.write_text(text)
    emit(verdict(code, text, limit))


# Named batches through the kernels, in the process that the tool watches.
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from gpu.blocks import sanitizers
sanitizers.watched(sys.argv[1], sys.argv[2])
"""


def watched(backend: str, device: str) -> None:
    import torch

    from attnpool_kernels import testing
    from gpu import batches, passes

    for name in BATCHES:
        for dtype in DTYPES:
            kind = getattr(torch, dtype)
            batch = batches.on_device(batches.CASES[name].make(kind, "cpu"), device)
            results = testing.run_kernels(batch, passes.load(backend, batch, kind))
            for key, x in results.items():
                if x.cpu().isnan().any():
                    raise AssertionError(f"{key} of {name}, {dtype} has NaN")
    print("all passes have run", flush=True)


def sanitizer() -> str:
    for folder in (None, *_cuda_folders()):
        if found := shutil.which("compute-sanitizer", path=folder):
            return found
    raise Outcome("missing", "compute-sanitizer is not installed")


def _cuda_folders() -> list[str]:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    return [
        str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")
    ]


def options_of(tool: str) -> str:
    """The text of its help: its options have had several names."""
    try:
        return output_of([tool, "--help"], 20.0)[1]
    except OSError as error:
        raise Outcome("missing", f"{tool} does not start: {error}") from error


def only(own: str, known: str) -> list[str]:
    """Options that restrict a tool to kernels with ``own`` in their names; none: all kernels."""
    for option in ("--kernel-regex", "--kernel-name", "--filter"):
        if re.search(rf"{option}\b(?!-)", known):
            return [option, f"kns={own}"]
    return []


def output_of(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code and output of a command; no code where it was killed after the limit.

    The command stays in our process group, so that whoever kills us kills it too.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            for child in (*_children(process.pid), process.pid):
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _children(pid: int) -> list[int]:
    """Processes below one, the deepest first: the tool's own program is one."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, tasks.read_text().split()):
                found += [*_children(child), child]
    return found


def verdict(code: int | None, text: str, limit: float) -> dict:
    """A row from what the tool has printed; clean only where all passes have run."""
    ran = "all passes have run" in text
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    facts = {"summary": summary[-1] if summary else ""}
    errors = [line for line in text.splitlines() if line.startswith("=========")]
    if code is None:
        return {"status": "no time", "text": f"killed after {limit:.0f} s", **facts}
    if code == FOUND or (summary and not re.match(r"0 (errors|hazards)", summary[-1])):
        return {"status": "wrong", "text": "\n".join(errors)[:2000], **facts}
    if code or not ran or not summary:
        return {"status": "failed", "text": f"exit code {code}: {text[-1500:]}", **facts}
    return {"status": "ok", **facts}
