"""Which generated bugs the tests notice: make mutation ARGS="--groups python cpu cuda triton".

Every mutant of the sample is planted in a copy of the tree under build/mutation, what it needs is
compiled, and the tests of its module run until the first one fails: of Python those that execute
the changed line, the quickest first. A row of tests/tools/mutation.csv is written at once, so that
an interrupted campaign goes on; ``--again survived`` repeats rows, ``--keys`` names some of them.
A limit is processor time, since other processes may share the machine.

tests/tools/mutation.json has the sample and, for bugs that nothing notices, the reason: why such a
bug changes nothing that is promised, or, after "open: ", what is missing.

Nothing is changed in the checkout but the table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import mutants  # noqa: E402
from tools.mutated_builds import Cpu, Cuda  # noqa: E402

TABLE = Path(__file__).with_name("mutation.csv")
PLAN = Path(__file__).with_name("mutation.json")
WORK = ROOT / "build" / "mutation"
TREE = WORK / "tree"
FIELDS = ("group", "path", "line", "operator", "before", "after", "key", "result", "noticed_by")
FIELDS += ("tests", "seconds", "commit", "date", "machine", "reason")
SECONDS = 60  # of processor time for one mutant
MEASURED = 25  # of measured test time that a mutant is given


class Recorder:
    """A plugin of pytest: runs the tests of a list in its order, and says which one failed."""

    def __init__(self, wanted: list[str] | None):
        self.wanted, self.failed, self.passed, self.times = wanted, "", 0, {}
        self.failures: list[str] = []

    def pytest_collection_modifyitems(self, items):
        if self.wanted is not None:
            rank = {name: i for i, name in enumerate(self.wanted)}
            items[:] = sorted((x for x in items if x.nodeid in rank), key=lambda x: rank[x.nodeid])

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_logreport(self, report):
        self.times[report.nodeid] = self.times.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid
            self.failures.append(report.nodeid)
        self.passed += report.when == "call" and report.passed

    def pytest_internalerror(self, excrepr):
        self.failed = self.failed or "internal error"


class Tracer:
    """Which lines of the package every test executes."""

    def __init__(self):
        self.inside = str(TREE / "attnpool_kernels")
        self.lines: dict[str, dict[str, list[int]]] = {}
        self.now: set[tuple[str, int]] = set()

    def _call(self, frame, event, argument):
        if frame.f_code.co_filename.startswith(self.inside):
            self.now.add((frame.f_code.co_filename, frame.f_lineno))
            return self._line
        return None

    def _line(self, frame, event, argument):
        self.now.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def pytest_runtest_logstart(self, nodeid, location):
        self.now = set()
        sys.settrace(self._call)

    def pytest_runtest_logfinish(self, nodeid, location):
        sys.settrace(None)
        found: dict[str, list[int]] = {}
        for path, line in sorted(self.now):
            found.setdefault(os.path.relpath(path, TREE), []).append(line)
        self.lines[nodeid] = found


def forked(work, seconds: float) -> tuple[dict, float, int]:
    """What work() returns in a forked process, its processor time and the signal that ended it.

    torch and pytest are imported by this process already, the package is not.
    """
    answer = WORK / "answer.json"
    answer.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            log = os.open(WORK / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            os.chdir(TREE)
            sys.path[:] = [str(TREE), str(TREE / "tests"), *sys.path]
            answer.write_text(json.dumps(work()))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 10 * seconds
    status = 0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return json.loads(answer.read_text()) if answer.exists() else {}, used, ended


def run_tests(files: list[str], wanted: list[str] | None, *more: str, plugins=(), **environment):
    """In a forked process: {failed, passed, times} of the tests."""
    for name in [x for x in sys.modules if x.split(".")[0] in ("tools", "attnpool_kernels")]:
        del sys.modules[name]  # those of the checkout
    os.environ.update(environment)
    import pytest

    recorder = Recorder(wanted)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", *more]
    code = pytest.main([*files, *options], plugins=[recorder, *plugins])
    if code == 4 and "while loading conftest" in (WORK / "log").read_text():
        recorder.failed = "import of the package"
    return {x: getattr(recorder, x) for x in ("failed", "failures", "passed", "times")}


def lines_of(file: str) -> dict:
    """{test: {seconds, lines: {path: [lines]}}} of a test file, kept under build/.

    Without torch's compiler, which tracing would keep from compiling.
    """
    digest = hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:8]
    kept = WORK / "lines" / f"{file.replace('/', '.')}.{digest}.json"
    if not kept.exists():
        tracer = Tracer()

        def work():
            found = run_tests([file], None, "--maxfail=1000", "-k", "not compile", plugins=[tracer])
            return {
                name: {"seconds": found["times"].get(name, 0), "lines": lines}
                for name, lines in tracer.lines.items()
                if name not in found["failures"]
            }

        found, used, _ = forked(work, 600)
        print(f"  {file}: {len(found)} tests traced in {used:.0f} s", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def tests_of(mutant: mutants.Mutant, files: list[str], only_those: bool) -> list[str]:
    """Those that execute the line, the quickest first, within MEASURED seconds; where there are
    none (a line that an import runs) those of the file or, unless only_those, all."""
    known = {name: x for file in files for name, x in lines_of(file).items()}
    on_line = [name for name, x in known.items() if mutant.line in x["lines"].get(mutant.path, ())]
    in_file = [name for name, x in known.items() if mutant.path in x["lines"]]
    found, total = [], 0.0
    rest = [] if only_those else known
    for name in sorted(on_line or in_file or rest, key=lambda x: known[x]["seconds"]):
        total += known[name]["seconds"]
        if total > MEASURED:
            break
        found.append(name)
    return found


def prepare(kind: str) -> None:
    """Imports what forked processes need, but for the package. Triton is interpreted or not from
    its import on, and torch's compiler imports it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    names = ["numpy", "pytest", "pytest_benchmark.plugin", "torch", "hypothesis"]
    if kind != "triton":
        names += ["torch._dynamo", "torch._inductor", "torch.onnx", "numpy.random"]
        assert "triton" not in sys.modules or "TRITON_INTERPRET" not in os.environ
    if kind == "python":
        names += ["torch_geometric.nn", "ase.io", "lightning.pytorch"]
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that collections of a forked process write to no page of this one


def copied_tree() -> None:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in names:
        source, target = ROOT / name, TREE / name
        if name and source.is_file() and not name.startswith("benchmarks/results"):
            new = not target.exists() or target.read_bytes() != source.read_bytes()
            if new:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
    for source in (ROOT / "attnpool_kernels").glob("*.so"):
        shutil.copy2(source, TREE / "attnpool_kernels" / source.name)


class Planted:
    """A mutant in the copied tree."""

    def __init__(self, mutant: mutants.Mutant):
        self.mutant, self.path = mutant, TREE / mutant.path

    def __enter__(self) -> None:
        self.text = (ROOT / self.mutant.path).read_text()
        self.path.write_text(self.mutant.apply(self.text))
        then = 10**9 + int(self.mutant.key[:7], 16)  # another date than what bytecode is kept of
        os.utime(self.path, (then, then))

    def __exit__(self, *error) -> None:
        shutil.copy2(ROOT / self.mutant.path, self.path)


def python(mutant: mutants.Mutant, part: dict) -> tuple[str, str, int, float]:
    total, used = 0, 0.0
    for group in (part["tests"], *([x] for x in part.get("then", ()))):
        wanted = tests_of(mutant, group, only_those=total > 0)
        files = list(dict.fromkeys(x.split("::")[0] for x in wanted))
        if not wanted:
            continue
        with Planted(mutant):
            result, noticed, tests, seconds = judged(lambda: run_tests(files, wanted), len(wanted))  # noqa: B023
        total, used = total + tests, used + seconds
        if result != "survived":
            break
    return result, noticed, total, used


def triton(mutant: mutants.Mutant, part: dict) -> tuple[str, str, int, float]:
    names = part["seeds"] if "few_seeds" in mutant.path else part["cases"]
    wanted = [f"tests/impl/test_triton_interpreted{x}" for x in names]
    files = sorted({x.split("::")[0] for x in wanted})
    with Planted(mutant):
        found = judged(lambda: run_tests(files, wanted, TRITON_INTERPRET="1"), len(wanted))
        return extended(found, part)


def extended(found: tuple[str, str, int, float], part: dict) -> tuple[str, str, int, float]:
    """What the rest of the tests says of a bug that the first ones did not notice."""
    if found[0] != "survived" or "then" not in part:
        return found
    files, only = part["then"], ("-k", part["only"])
    more = judged(lambda: run_tests(files, None, *only), len(files), 10 * SECONDS)
    return more[0], more[1], found[2] + more[2], found[3] + more[3]


_builds: dict = {}


def compiled(mutant: mutants.Mutant, part: dict) -> tuple[str, str, int, float]:
    """Of C++: the changed file with the others' objects, in a library of its own. Without a change
    every test must pass, in spite of the lower optimisation."""
    kind = {"cpu": Cpu, "cuda": Cuda}[part["kind"]]
    if kind not in _builds:
        _builds[kind] = kind(TREE, WORK / part["kind"])
        unchanged = by_library(part, _builds[kind], _builds[kind].mutated(""))
        if unchanged[0] != "survived":
            raise SystemExit(f"without a bug: {unchanged[1]}")
    build = _builds[kind]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Planted(mutant):
        library = build.mutated(mutant.path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if library is None:
        return "does not compile", "", 0, spent
    result, noticed, tests, used = by_library(part, build, library)
    return result, noticed, tests, spent + used


def by_library(part: dict, build, library: Path) -> tuple[str, str, int, float]:
    if part["kind"] == "cuda":
        return judged(lambda: build.judge(library, part["cases"]), 1)
    name = f"attnpool_kernels/{library.name}"
    file = "tests/impl/test_cpu_kernels.py"
    wanted = [f"{file}::{x}" for x in part["cases"]]
    try:
        (TREE / name).unlink()
        shutil.copy2(library, TREE / name)
        return extended(judged(lambda: run_tests([file], wanted), len(wanted)), part)
    finally:
        (TREE / name).unlink()
        shutil.copy2(ROOT / name, TREE / name)


def judged(work, wanted: int, seconds: float = SECONDS) -> tuple[str, str, int, float]:
    found, used, ended = forked(work, seconds)
    if ended in (signal.SIGXCPU, signal.SIGKILL):
        return "timeout", "", 0, used
    if ended or not found:  # a crash
        return "noticed", f"signal {ended}" if ended else "crash", 0, used
    if found["failed"]:
        return "noticed", found["failed"], found["passed"] + 1, used
    if not found["passed"]:
        raise SystemExit(f"none of {wanted} tests ran: {(WORK / 'log').read_text()[-2000:]}")
    return "survived", "", found["passed"], used


RUNNERS = {"python": python, "triton": triton, "cpu": compiled, "cuda": compiled}


def sample(part: dict, seed: int) -> list[mutants.Mutant]:
    files = sorted(x for pattern in part["files_of"] for x in ROOT.glob(pattern))
    files = [x for x in files if x.name not in part.get("without", ())]
    return mutants.chosen(files, ROOT, part["count"], seed)


def read() -> list[dict]:
    return list(csv.DictReader(TABLE.open())) if TABLE.exists() else []


def write(rows: list[dict]) -> None:
    reasons = json.loads(PLAN.read_text())["reasons"]
    for row in rows:
        row["reason"] = reasons.get(row["key"], "")
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().split("\n"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="*", help="of tests/tools/mutation.json; all by default")
    parser.add_argument(
        "--again", nargs="*", default=[], help="results to be repeated, where no reason is known"
    )
    parser.add_argument("--keys", nargs="*", help="only these mutants, whatever the table has")
    parser.add_argument("--limit", type=int, default=10**9, help="mutants of a group")
    parser.add_argument("--minutes", type=float, default=10**9)
    parser.add_argument("--list", action="store_true", help="print the sample and stop")
    given = parser.parse_args()
    plan = json.loads(PLAN.read_text())
    rows = {row["key"]: row for row in read()}
    until = time.monotonic() + 60 * given.minutes
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    if not given.list:
        copied_tree()
    for part in plan["groups"]:
        group = part["group"]
        if given.groups and group not in given.groups and part["kind"] not in given.groups:
            continue
        taken = 0
        if not given.list:
            prepare(part["kind"])
        for mutant in sample(part, plan["seed"]):
            known = rows.get(mutant.key)
            repeat = known is not None and known["result"] in given.again
            repeat = repeat and mutant.key not in plan["reasons"]
            if (given.keys and mutant.key not in given.keys) or taken >= given.limit:
                continue
            if known is not None and not repeat and not given.keys:
                continue
            if given.list:
                print(group, mutant.path, mutant.line, mutant.operator, mutant.key)
                continue
            if time.monotonic() > until:
                return
            taken += 1
            result, noticed, tests, used = RUNNERS[part["kind"]](mutant, part)
            rows[mutant.key] = {
                "group": group,
                "path": mutant.path,
                "line": mutant.line,
                "operator": mutant.operator,
                "before": mutant.before,
                "after": mutant.after,
                "key": mutant.key,
                "result": result,
                "noticed_by": noticed,
                "tests": tests,
                "seconds": f"{used:.1f}",
                "commit": commit,
                "date": datetime.date.today().isoformat(),
                "machine": processor(),
            }
            write(list(rows.values()))
            change = f"{mutant.before.strip()!r} -> {mutant.after.strip()!r}"
            print(f"{result:9} {used:5.1f} s {mutant.path}:{mutant.line} {change}", flush=True)
            print(f"          {mutant.key} {mutant.operator} {noticed} ({tests})", flush=True)
    if rows and not given.list:
        write(list(rows.values()))
        lost = [x for x in rows.values() if x["result"] == "survived"]
        built = [x for x in rows.values() if x["result"] != "does not compile"]
        equal = [x for x in lost if x["reason"] and not x["reason"].startswith("open: ")]
        share = 1 - (len(lost) - len(equal)) / max(1, len(built) - len(equal))
        print(f"{len(built)} bugs, {len(lost)} survived ({len(equal)} equivalent): {share:.1%}")


if __name__ == "__main__":
    main()
