"""Rehearsals of the evidence on a machine without a GPU, as it will be run on one.

A copy of the tree's files and the built libraries, an empty HOME, no network, none of the packages
that only tests have; every block, and faults planted among them.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .case import GOOD, Settings, pack, unpack
from .evidence import ASKED_FOR, ORDER

ROOT = Path(__file__).resolve().parent.parent.parent
GUARD = """
import socket
def refuse(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise OSError("no network in a rehearsal")
    return connect(self, address, *rest)
connect, socket.socket.connect = socket.socket.connect, refuse

import sys
class Without:
    # A finder that lacks what a bare machine lacks.
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ase", "pytest", "psutil", "matplotlib", "tqdm", "lightning"}:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def no_network() -> list[str]:
    """A command that takes the network away from what follows; [] where that is not allowed."""
    for command in (["unshare", "-rn"], ["unshare", "-n"]):
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True).returncode
        ):
            return command
    return []


class Machine:
    """A bare machine: a copy of the tree, and commands in it."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.out, self.home = folder / "tree", folder / "out", folder / "home"
        self.guard = folder / "guard"
        for path in (self.home, self.guard):
            path.mkdir()
        (self.guard / "sitecustomize.py").write_text(GUARD)
        for name in tracked():
            target = self.tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        for path in (ROOT / "attnpool_kernels").glob("*.so"):
            shutil.copy2(path, self.tree / "attnpool_kernels")
        shutil.move(self.tree / "tests/gpu/planted.py", self.tree / "tests/gpu/blocks/planted.py")

    def start(self, out: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        known = {key: x for key, x in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH")}
        known |= {"HOME": str(self.home), "PYTHONPATH": str(self.guard), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tests/gpu/evidence.py", "--device", "cpu", "--cores", "1"]
        return subprocess.Popen(
            [*no_network(), *command, "--out", str(out), *arguments],
            cwd=self.tree,
            env=known | environment,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.STDOUT,
        )

    def run(self, out: Path, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(out, *arguments, **environment)
        text, _ = process.communicate(timeout=900)
        return process.returncode, text


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evidence.jsonl").open()]


def tracked() -> list[str]:
    """Files that would travel: those that git knows or would not ignore."""
    found = subprocess.run(
        [
            "git",
            "ls-files",
            "-co",
            "--exclude-standard",
            "attnpool_kernels",
            "benchmarks",
            "csrc",
            "tests",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        pytest.skip("not in a checkout: which files would travel is not known")
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def rehearsal(machine):
    """All blocks and the faults, once."""
    code, text = machine.run(machine.out, "--minutes", "8")
    return code, text, rows_in(machine.out)


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within the time; a zombie has ended."""
    end = time.time() + seconds
    while time.time() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def cases_of(rows: list[dict]) -> dict[str, dict]:
    return {row["key"]: row for row in rows if row["what"] == "case"}


def test_every_block_runs(rehearsal):
    _, text, rows = rehearsal
    cases = cases_of(rows)
    blocks = {row["block"] for row in cases.values()}
    assert blocks == {*ORDER, "planted"} - {*ASKED_FOR}, text
    bad = [row for row in cases.values() if row["status"] not in GOOD]
    assert {row["block"] for row in bad} == {"planted"}, text
    assert [key for key, n in Counter(cases_keys(rows)).items() if n > 1] == []
    for name in blocks:
        assert f"\n{name}" in text
    assert "GB/s, bfloat16" in text and "no lines of" not in text


def cases_keys(rows: list[dict]) -> list[str]:
    return [row["key"] for row in rows if row["what"] == "case"]


def test_rows_say_what_was_measured_and_with_what(rehearsal):
    _, _, rows = rehearsal
    judged = [row for row in rows if row["block"] == "correctness" and row["what"] != "case"]
    assert {row["backend"] for row in judged} == {"cpu", "triton"}
    for row in judged:
        assert set(row["error"]) >= {"out", "lse", "dq", "dk", "dv", "gq", "gk", "gv", "gdout"}
        assert set(row["of_budget"]) <= set(row["error"])
        assert 0 < max(row["of_budget"].values()) <= 1
        assert row["versions"]["torch"] and len(row["kernels"]) == 16 and row["shape"]
    only_cuda = {row["block"] for row in rows if row["status"] == "needs cuda"}
    assert {"invariants", "sanitizers", "planted"} <= only_cuda


def test_faults_cost_their_case_only(rehearsal, machine):
    code, text, rows = rehearsal
    status = {row["name"]: row["status"] for row in rows if row["block"] == "planted"}
    assert status == {
        "before": "ok",
        "segfault": "crashed",
        "after": "ok",
        "exit": "crashed",
        "exception": "failed",
        "library": "missing",
        "dead GPU": "failed",
        "behind": "ok",
        "wrong": "wrong",
        "hang": "hang",
        "graph": "needs cuda",
    }
    assert code == 1
    own = {row["name"]: row for row in rows if row["block"] == "planted" and row["what"] == "case"}
    assert own["segfault"]["text"].startswith("SIGSEGV: ")
    assert "planted.py" in own["segfault"]["text"]  # where it was
    assert "exit code 7" in own["exit"]["text"]
    assert "out: " in own["wrong"]["text"] and "sticky" in own["dead GPU"]["text"]
    who = {row["name"]: row for row in rows if row["block"] == "planted" and row["what"] == "who"}
    assert who["dead GPU"]["pid"] != who["behind"]["pid"]  # not in a process whose GPU is dead
    assert who["exception"]["pid"] == who["library"]["pid"]
    assert {Path(row["package"]).parent for row in who.values()} == {
        machine.tree / "attnpool_kernels"
    }
    others = [row["pid"] for row in rows if row["what"] == "other"]
    assert others and all(map(gone, others))
    for name in ("segfault", "exit", "wrong", "hang"):
        assert f"planted/{name}/" in text


def test_there_was_no_network(rehearsal):
    _, _, rows = rehearsal
    (row,) = [row for row in rows if row["what"] == "network"]
    assert row["text"] == "no network in a rehearsal"
    assert not no_network() or row["interfaces"] == ["lo"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_of_every_block(device, tmp_path):
    """What a run lists before it starts: also for CUDA, without touching it."""
    settings = Settings(device, tmp_path, tmp_path, cores=16)
    seen = set()
    for name in ORDER:
        block = importlib.import_module(f"gpu.blocks.{name}")
        assert name == block.NAME and block.WEIGHT > 0
        cases = block.cases(settings)
        assert cases and {case.block for case in cases} == {name}
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys)
        assert {case.after for case in cases} <= seen | {""}
        assert 1 <= getattr(block, "PARALLEL", lambda _: 1)(settings) <= 16
        shards = {}
        for case in cases:
            if case.shard:
                shards.setdefault((case.shard, case.backend), set()).add(case.environment)
        assert all(len(kinds) == 1 for kinds in shards.values())
        assert unpack(pack(settings, cases)) == (settings, cases)
        seen.add(name)
        only = block.cases(replace(settings, backends=("cuda",)))
        assert {case.backend for case in only} <= {"", "cuda"}
    assert not torch.cuda.is_initialized()


def test_nothing_is_written_at_home(rehearsal, machine):
    assert list(machine.home.iterdir()) == []


def test_resume_skips_what_is_done(rehearsal, machine):
    _, _, rows = rehearsal
    with (machine.out / "evidence.jsonl").open("a") as file:
        file.write('{"what": "case", "key": "cut o')  # as a run leaves it that is killed
    code, text = machine.run(machine.out, "--minutes", "2", "--resume")
    found = [line for line in (machine.out / "evidence.jsonl").open() if '"cut o' not in line]
    assert [json.loads(line) for line in found] == rows, text
    assert code == 0 and f"{len(cases_of(rows))} cases were done before" in text


def test_ends_within_its_minutes(machine, tmp_path):
    began = time.time()
    forever = {"EVIDENCE_FOREVER": str(tmp_path / "who")}
    code, text = machine.run(tmp_path, "--minutes", "0.5", "--blocks", "planted", **forever)
    assert time.time() - began < 30 + 3, text  # 3: the interpreter's own start and end
    (row,) = cases_of(rows_in(tmp_path)).values()
    assert row["status"] == "no time" and code == 3
    pids = [row["pid"] for row in rows_in(tmp_path) if "pid" in row]
    assert len(pids) == 2 and all(map(gone, pids))


def test_nothing_outlives_a_killed_run(machine, tmp_path):
    said = tmp_path / "who"
    forever = {"EVIDENCE_FOREVER": str(said)}
    process = machine.start(tmp_path, "--minutes", "2", "--blocks", "planted", **forever)
    end = time.time() + 90
    while not (said.exists() and " " in said.read_text()) and time.time() < end:
        time.sleep(0.1)
    pids = [int(pid) for pid in said.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(pids) == 2 and all(map(gone, pids))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--blocks", "nothing"], "no such block: nothing"),
        (["--minutes", "0.05"], "--minutes must be above"),
        (["--minutes", "nan"], "--minutes must be above"),
        (["--minutes", "inf"], "--minutes must be above"),
        (["--cores", "0"], "--cores must be at least 1"),
        (["--backends", "nope"], "no such backend: nope"),
        (["--out", __file__], "--out must be a folder to write to"),
        (["--out", "/proc/nope"], "--out must be a folder to write to"),
    ],
)
def test_arguments_are_refused_by_name(arguments, text, capsys, tmp_path):
    from .evidence import options

    with pytest.raises(SystemExit) as stopped:
        options(["--out", str(tmp_path), "--minutes", "1", *arguments])
    assert stopped.value.code == 2 and text in capsys.readouterr().err
