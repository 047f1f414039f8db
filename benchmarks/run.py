"""Command line of the benchmark: ``python -m benchmarks.run``; see --help."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from .contenders import registry
from .measuring import memory, overheads, rates, sheet
from .measuring.base import Base
from .measuring.provenance import device_name, provenance
from .measuring.sheet import BenchmarkError
from .measuring.sweep import Limits, Sweep
from .reporting import goals, plot, tables
from .studies import molecules
from .studies.options import positive
from .workloads import suites
from .workloads.workload import PASSES, Workload

# Of the sweep; suites put the most telling points first, and the rest becomes "skipped".
MINUTES = dict.fromkeys(suites.SUITES, 8.0) | {"quick": 4.5}
# Timed seconds per contender, workload and pass; longest single call in seconds.
BUDGET = {"quick": (0.12, 4.0), "paper": (0.15, 10.0), "seeds": (0.2, 10.0), "modules": (0.3, 25.0)}

DESCRIPTION = """\
Time and peak memory of set attention against the number of atoms.

Every contender starts from packed rows and ends with packed rows: padding and unpadding count.
Each is checked against float64 before it is timed. The contenders take turns within one process;
peak memory comes from a child process for each point (CPU) or from torch's allocator (CUDA).
On CUDA a call of less than 10 ms is timed by replays of a graph, on inputs larger than the cache.
Refusals, wrong results, out of memory and timeouts are rows with their reasons.
"""
SUITES = "".join(f"  {name:10} {text}\n" for name, (text, _) in suites.SUITES.items())
EPILOG = f"""\
suites, their most telling points first:
{SUITES}
examples:
  python -m benchmarks.run                              the quick suite on the CPU, < 5 minutes
  python -m benchmarks.run --suite molecules            real sizes, table of performance goals
  python -m benchmarks.run --suite paper --minutes inf  the whole scaling study, 8 to 100,000 atoms
  python -m benchmarks.run --device cuda --minutes 6    any CUDA machine, no network needed
  python -m benchmarks.run --tiny                       everything once at toy sizes, < 1 minute
  python -m benchmarks.run --contenders attnpool:cpu,flash --suite seeds
  python -m benchmarks.run --base v0.1.0 --contenders attnpool:cpu    against another git ref
  python -m benchmarks.run --resume                     goes on where an interrupted run stopped
  python -m benchmarks.report                           one HTML page from committed results

exit code: 0; 1 where one of our kernels was wrong or failed; 2 for what you can repair, in one line
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.run",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--suite", default="quick", metavar="NAME", help="see below (default: quick)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    p.add_argument("--contenders", metavar="A,B", help="only these; --list shows the names")
    p.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="CSV file, or folder for <suite>.csv (default: benchmarks/out/<device>)",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of the output file and measure only what is missing",
    )
    p.add_argument(
        "--base",
        metavar="REF",
        help="also time our kernels as of this git ref (built in a worktree)",
    )
    p.add_argument("--tiny", action="store_true", help="toy sizes: does everything work here?")
    p.add_argument("--list", action="store_true", help="list contenders and reasons, and stop")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="skip points that would start later than this (default: 8, quick 4.5; inf: all)",
    )
    p.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="timed seconds per contender, workload and pass (default: 0.12 to 0.3 by suite)",
    )
    p.add_argument(
        "--call",
        type=float,
        metavar="S",
        help="longest single call before it is a timeout (default: 10; quick 4, modules 25); "
        "6 times that for one molecule of 100,000 atoms",
    )
    p.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="memory over the inputs before it is out of memory (default: 85%% of free)",
    )
    p.add_argument("--qm7b", type=Path, metavar="PATH", help="qm7b.npz for the real molecules")
    p.add_argument("--no-figures", action="store_true", help="no PNG and SVG beside the CSV")
    p.add_argument("--no-molecules", action="store_true", help="skip the real molecules at the end")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore")  # prototype notices of nested tensors and the like
    logging.disable(logging.WARNING)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # the same clean end
    try:
        return _run(options)
    except BenchmarkError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; rows so far are kept, go on with --resume", file=sys.stderr)
        return 130
    finally:
        memory.stop()


def _run(options: argparse.Namespace) -> int:
    names = _check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    workloads = suites.suite(options.suite, options.device, options.tiny)
    if options.list:
        _list(workloads, options.device)
        return 0
    if not any(registry.for_workload(work, names) for work in workloads):
        raise BenchmarkError(
            f"{', '.join(names or [])}: no part in suite {options.suite}; see --list"
        )
    path = _path(options)
    table = sheet.Sheet(path, options.resume)
    # Only the names of files: a record is published, a folder is nobody else's business.
    chosen = {
        k: v.name if isinstance(v, Path) else str(v)
        for k, v in vars(options).items()
        if v not in (None, False)
    }
    chosen.pop("output", None)
    base = None
    begin = time.monotonic()
    try:
        seconds = 0.1 if options.tiny else 0.6
        dtypes = {w.dtype for w in workloads}
        found = rates.measure(dtypes, options.device, seconds)
        about = provenance(options.device, chosen)
        about["rates"] = found.record()
        table.start(about)
        print(_headline(about), flush=True)
        if options.base:
            base = Base(options.base, options.device)
        sweep = Sweep(options.suite, options.device, found, table, _limits(options), names, base)
        sweep.run(workloads)
        if options.suite == "molecules":
            overheads.measure(sweep, options.tiny)
        # Again after it: what the machine reached at any time is its limit.
        sweep.settle(rates.measure(dtypes, options.device, seconds))
    finally:
        if base is not None:
            base.close()
    print("\n" + tables.everything(table.rows))
    if options.suite == "molecules":
        print("\n" + goals.render(table.rows))
        if options.tiny:
            print("(toy sizes: these numbers mean nothing)")
    print(f"\nresults: {path}")
    if not options.no_figures:
        for figure in plot.draw(table.rows, path.with_suffix(""), _title(about)):
            print(f"figure:  {figure}")
    agree = True
    if not options.no_molecules:
        print()
        agree = molecules.compare(options.qm7b, 32 if options.tiny else 512, not options.tiny)
    print(f"total {time.monotonic() - begin:.0f} s")
    wrong = [row for row in table.rows if row.ours and row.status in ("wrong", "error")]
    for row in wrong:
        print(f"FAILED: {row.contender} on {row.workload}, {row.what}: {row.reason}")
    return 0 if agree and not wrong else 1


def _check(options: argparse.Namespace) -> list[str] | None:
    """Everything about the options that can be wrong; the contenders' names."""
    if options.suite not in suites.SUITES:
        raise BenchmarkError(
            f"unknown suite {options.suite!r}; there are {', '.join(suites.SUITES)}"
        )
    if options.device not in ("cpu", "cuda"):
        raise BenchmarkError(f"unknown device {options.device!r}; there are cpu and cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"device cuda: torch {torch.__version__} sees no CUDA device here")
    positive(options, "threads", "minutes", "budget", "call", "memory")
    if options.qm7b is not None and not options.qm7b.is_file():
        raise BenchmarkError(f"--qm7b {options.qm7b}: there is no such file")
    if options.qm7b is not None and not options.no_molecules:
        molecules.load(options.qm7b)  # a damaged file is known now, not after the suite
    if options.contenders is None:
        return None
    names = [name for name in options.contenders.split(",") if name]
    for name in names:
        if name not in registry.CONTENDERS:
            known = ", ".join(registry.CONTENDERS)
            raise BenchmarkError(f"unknown contender {name!r}; there are {known}")
    if not names:
        raise BenchmarkError("--contenders names none")
    return names


def _path(options: argparse.Namespace) -> Path:
    name = options.suite + ("-tiny" if options.tiny else "")
    if options.output is None:
        slug = re.sub("[^a-z0-9]+", "-", device_name(options.device).lower()).strip("-")
        return sheet.OUT / f"{slug}-{torch.get_num_threads()}" / f"{name}.csv"
    is_file = options.output.suffix or (options.output.exists() and not options.output.is_dir())
    return options.output if is_file else options.output / f"{name}.csv"


def _limits(options: argparse.Namespace) -> Limits:
    budget, call = BUDGET.get(options.suite, (0.3, 10.0))
    fewest = 5
    if options.tiny:
        budget, call, fewest = 0.005, 4.0, 2
    return Limits(
        budget_s=options.budget or budget,
        call_s=options.call or call,
        cap_bytes=int((options.memory or 0) * 1e9),
        minutes=options.minutes or MINUTES[options.suite],
        fewest=fewest,
    )


def _headline(about: dict) -> str:
    versions = " ".join(f"{name} {x}" for name, x in about["versions"].items())
    return (
        f"{about['device']}, {about['threads']} threads; {versions}; "
        f"attnpool_kernels {about['attnpool_kernels']} at {about['commit'] or 'no commit'}\n"
        f"measured now: {rates.said(about['rates'])}"
    )


def _title(about: dict) -> str:
    return f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}"


def _list(workloads: list[Workload], device: str) -> None:
    work = workloads[0]
    print(f"contenders for {work.key} on {device}; a reason where one cannot run")
    own = [c for c in registry.CONTENDERS.values() if c.module == work.module]
    for contender in own:
        lines = []
        for what in PASSES:
            reasons = contender.why_not(work, what, device)
            lines.append(f"{what}: {'; '.join(reasons) or 'ok'}")
        if len({line.split(": ", 1)[1] for line in lines}) == 1:
            lines = [lines[0].split(": ", 1)[1]]
        print(f"  {contender.name:20} {contender.title}\n" + "\n".join(f"      {x}" for x in lines))
    others = [name for name, c in registry.CONTENDERS.items() if c.module != work.module]
    print(f"in {'the other suites' if work.module else '--suite modules'}: {', '.join(others)}")


if __name__ == "__main__":
    sys.exit(main())
