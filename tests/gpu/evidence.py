"""What only a GPU can show, within given minutes, on a bare machine.

    python3 tests/gpu/evidence.py --out DIR --minutes 9
    python3 tests/gpu/evidence.py --out DIR --minutes 5 --blocks speed rivals --backends cuda
    python3 tests/gpu/evidence.py --out DIR --minutes 5 --resume        goes on where that one ended
    python3 tests/gpu/evidence.py --out DIR --minutes 2 --device cpu    rehearses all of it

Needs a Python with torch and Triton and this tree: no installation, no network, no HOME. Every case
runs in a process of its own kind; a crash, a hang, a dead CUDA context or a missing library costs
that case and is a row. DIR/evidence.jsonl gets a line for each result as soon as it is there, and a
table is printed last. Exits with 0 where everything is right, 1 where something is not, 2 where
there is no CUDA device or an argument is wrong, 3 where nothing is wrong but time was short.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose names are not for everybody
    sys.path.insert(1, str(ROOT / "tests"))

import argparse  # noqa: E402
import datetime  # noqa: E402
import hashlib  # noqa: E402
import importlib  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from types import ModuleType  # noqa: E402

from gpu import summary  # noqa: E402
from gpu.case import Case, Settings  # noqa: E402
from gpu.runner import Journal, Runner  # noqa: E402

# Correctness and kernel times come first: what is cut off should be what matters least.
ORDER = (
    "environment",
    "smoke",
    "prewarm",
    "correctness",
    "speed",
    "rivals",
    "adapters",
    "invariants",
    "sanitizers",
    "sweep",
)
ASKED_FOR = ("sweep",)  # only where --blocks names them
ROWS = "evidence.jsonl"
LONGEST = 24 * 3600.0  # seconds that can be asked for
RESERVE = 3.0  # seconds of the minutes that are kept for killing, the table and the exit


def kernel_hash() -> str:
    """Of all sources of kernels: rows of other sources do not speak for these."""
    package = ROOT / "attnpool_kernels"
    files = [*(ROOT / "csrc").rglob("*"), *(package / "impl").rglob("*.py")]
    files += [package / "autograd.py", package / "ops.py"]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def available() -> list[str]:
    """Names of all blocks in their order; modules that the order does not know come last."""
    found = {path.stem for path in (ROOT / "tests/gpu/blocks").glob("*.py")} - {"__init__"}
    known = [name for name in ORDER if name in found]
    return known + sorted(found - set(known))


def load(names: list[str], runner_end) -> list[ModuleType]:
    blocks = []
    for name in names:
        try:
            module = importlib.import_module(f"gpu.blocks.{name}")
        except Exception as error:
            runner_end(Case(name, "import"), "failed", f"{type(error).__name__}: {error}", 0.0, {})
            continue
        if hasattr(module, "NAME"):  # else: what blocks share
            blocks.append(module)
    return blocks


def cache_folder() -> Path:
    """Kept between runs of the tree where that can be written."""
    try:
        folder = ROOT / "build" / "evidence-cache"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe").write_text("")
        return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="evidence-cache-"))


def has_cuda() -> bool:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # without starting CUDA here
    import torch

    return torch.cuda.is_available()


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, required=True, help="after which it has ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--blocks", nargs="+", metavar="BLOCK", help=", ".join(available()))
    parser.add_argument("--backends", nargs="+", metavar="BACKEND", default=[])
    parser.add_argument("--resume", action="store_true", help="skip the cases that have rows")
    parser.add_argument("--retry", action="store_true", help="--resume, but repeat what went wrong")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    found = parser.parse_args(arguments)
    unknown = set(found.blocks or ()) - set(available())
    if unknown:
        parser.error(f"no such block: {', '.join(sorted(unknown))}; there are {available()}")
    if not 2 * RESERVE < found.minutes * 60 <= LONGEST:
        parser.error(
            f"--minutes must be above {2 * RESERVE / 60} and at most {LONGEST / 60:.0f}, "
            f"got {found.minutes}"
        )
    if found.cores < 1:
        parser.error(f"--cores must be at least 1, got {found.cores}")
    from attnpool_kernels.impl import PRIORITY

    if strange := set(found.backends) - set(PRIORITY):
        parser.error(f"no such backend: {', '.join(sorted(strange))}; there are {PRIORITY}")
    try:
        found.out.mkdir(parents=True, exist_ok=True)
        with open(found.out / ROWS, "a"):
            pass
    except OSError as error:
        parser.error(f"--out must be a folder to write to: {error}")
    return found


def main(arguments: list[str]) -> int:
    chosen, began = options(arguments), time.time()
    end = began + chosen.minutes * 60
    # If all else fails the kernel ends this process, and with it its children.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, chosen.minutes * 60)
    if chosen.device == "cuda" and not has_cuda():
        print("no CUDA device: nothing was done (--device cpu rehearses)")
        return 2
    facts = {
        "kernels": kernel_hash(),
        "device": chosen.device,
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    journal = Journal(chosen.out / ROWS, facts)
    settings = Settings(
        chosen.device, chosen.out.resolve(), cache_folder(), tuple(chosen.backends), chosen.cores
    )
    runner = Runner(settings, journal, Path(__file__).resolve(), end - RESERVE)
    names = [name for name in available() if name in (chosen.blocks or ORDER)]
    if not chosen.blocks:
        names = [name for name in available() if name not in ASKED_FOR]
    blocks = load(names, runner._end)
    skip = journal.finished(chosen.retry) if chosen.resume or chosen.retry else set()

    def interrupted(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        runner.run(blocks, skip)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    runner.stop()
    print("\n".join(summary.table(journal.rows, blocks, len(skip))), flush=True)
    return summary.verdict(journal.rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from gpu import child

        code = child.main(int(sys.argv[2]), int(sys.argv[3]))
    else:
        code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait for a process that cannot be killed do not hold us, nor does CUDA's own end.
    os._exit(code)
