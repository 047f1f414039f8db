"""Runs the cases of blocks in processes of their own, and writes what becomes of each.

The process that runs this never touches the GPU. It shares what is left of the minutes out among
the blocks by weight, kills what takes too long with all its children, and writes a row for every
case, whatever happens to its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from .case import BAD, STATUSES, UNFINISHED, Case, Settings, pack

START = 90.0  # seconds that a process may take to import torch on a cold machine
LEAST = 40.0  # seconds of a block, where they are there: what it leaves goes to the others
SHORTEST = 1.0  # seconds for which no process is started any more
TAIL = 1500  # characters of a dead process's output in its row


class Journal:
    """``evidence.jsonl``: one flushed line per row, and the rows of runs before this one."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []  # of this run, in their order
        self.facts, self._began, self._lock = facts, time.time(), threading.Lock()
        self.before = list(_read(path))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self.before and not path.read_bytes().endswith(b"\n"):
            os.write(self._file, b"\n")  # the run before was killed within a line

    def write(self, row: dict[str, Any]) -> None:
        with self._lock:
            at = {"at": round(time.time() - self._began, 2)}
            row = {key: _short(x) for key, x in (row | at | self.facts).items()}
            os.write(self._file, (json.dumps(row) + "\n").encode())
            self.rows.append(row)

    def finished(self, retry: bool) -> set[str]:
        """Keys of the cases that earlier runs of these kernels on this device are done with."""
        found = {}
        for row in self.before:
            same = all(row.get(key) == self.facts[key] for key in ("kernels", "device"))
            if row.get("what") == "case" and same:
                found[row.get("key")] = row.get("status")
        again = (*UNFINISHED, *BAD) if retry else UNFINISHED
        return {key for key, status in found.items() if key and status not in again}


def _read(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _short(x: Any) -> Any:
    """Five digits are enough of anything measured."""
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_short(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


class Runner:
    def __init__(self, settings: Settings, journal: Journal, script: Path, end: float) -> None:
        self.settings, self.journal, self.script, self.end = settings, journal, script, end
        self._groups: set[int] = set()
        self._over: dict[str, threading.Event] = {}
        self._stop = threading.Event()

    def run(self, blocks: list[ModuleType], skip: set[str]) -> None:
        """All blocks in their order; what one leaves of its share goes to those behind it."""
        threads = []
        for place, block in enumerate(blocks):
            if self._stop.is_set():
                return
            left = max(0.0, self.end - time.time())
            share = left * block.WEIGHT / sum(other.WEIGHT for other in blocks[place:])
            deadline = time.time() + max(share, min(left / 2, LEAST))
            self._over[block.NAME] = threading.Event()
            if getattr(block, "BACKGROUND", False):
                thread = threading.Thread(
                    target=self._block, args=(block, deadline, skip), daemon=True
                )
                thread.start()
                threads.append(thread)
            else:
                self._block(block, deadline, skip)
        for thread in threads:
            thread.join(max(0.0, self.end + 1.0 - time.time()))

    def stop(self) -> None:
        """Kills everything that runs; nothing new starts."""
        self._stop.set()
        for group in list(self._groups):
            _kill(group)

    def _block(self, block: ModuleType, deadline: float, skip: set[str]) -> None:
        try:
            settings = replace(self.settings, deadline=deadline)
            try:
                cases = [case for case in block.cases(settings) if case.key not in skip]
                twice = {case.key for case in cases if [c.key for c in cases].count(case.key) > 1}
                if twice:
                    raise ValueError(f"cases with the same key: {', '.join(sorted(twice))}")
                parallel = getattr(block, "PARALLEL", lambda _: 1)(settings)
            except Exception as error:
                case = Case(block.NAME, "the list of cases")
                self._end(case, "failed", f"{type(error).__name__}: {error}", 0.0, {})
                return
            shards: dict[tuple, list[Case]] = {}
            for case in cases:
                if case.needs_cuda and settings.device != "cuda":
                    self._end(case, "needs cuda", "", 0.0, {})
                    continue
                key: tuple = case.shard or case.key, case.backend, case.environment
                if settings.device == "cpu" and case.shard:
                    # Starting processes takes the most time here: as few as can be.
                    key = case.backend == "triton", case.environment
                shards.setdefault(key, []).append(case)
            waiting, lock = list(shards.values()), threading.Lock()

            def work() -> None:
                while True:
                    with lock:
                        if not waiting:
                            return
                        shard = waiting.pop(0)
                    self._shard(shard, replace(settings, cores=settings.cores // parallel or 1))

            workers = [threading.Thread(target=work, daemon=True) for _ in range(parallel)]
            for worker in workers:
                worker.start()
            for worker in workers:  # one may wait for a process that cannot be killed
                worker.join(max(0.0, self.end + 1.0 - time.time()))
        finally:
            self._over[block.NAME].set()

    def _shard(self, cases: list[Case], settings: Settings) -> None:
        for name in {case.after for case in cases}:
            if name in self._over:
                self._over[name].wait(max(0.0, settings.left()))
        rest = cases
        while rest:
            if self._stop.is_set() or settings.left() < SHORTEST:
                for case in rest:
                    self._end(case, "no time", "", 0.0, {})
                return
            try:
                done = self._process(rest, settings)
            except Exception as error:  # a full disk, too many processes: what can be is not known
                self._end(rest[0], "failed", f"runner: {type(error).__name__}: {error}", 0.0, {})
                done = 1
            rest = rest[done:]

    def _process(self, cases: list[Case], settings: Settings) -> int:
        """Runs cases until one ends the process. Returns for how many there are rows now."""
        first, done, versions = cases[0], 0, {}
        log = settings.out / "log" / f"{_file_name(first)}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        theirs, ours = os.pipe()[::-1]
        with open(log, "ab") as output:
            said = output.tell()  # by the processes before
            process = subprocess.Popen(
                [sys.executable, str(self.script), "--child", str(theirs), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(theirs,),
                env=self._environment(first, settings),
                start_new_session=True,
            )
        os.close(theirs)
        self._groups.add(process.pid)
        try:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(pack(settings, cases).encode())
                process.stdin.close()
            began, limit, text = time.time(), START, b""
            while done < len(cases):
                left = min(began + limit, settings.deadline) - time.time()
                lines, more = _receive(ours, max(0.0, left))
                text += lines
                *whole, text = text.split(b"\n")
                for line in whole:
                    event = json.loads(line)
                    case = cases[min(done, len(cases) - 1)]
                    if event["event"] == "ready":
                        versions = event["versions"]
                    elif event["event"] == "begin":
                        began, limit = time.time(), case.seconds
                    elif event["event"] == "row":
                        self._row(case, event["row"], versions)
                    elif event["event"] == "end":
                        facts = {"card": event["card"]} if "card" in event else {}
                        self._end(
                            case, event["status"], event["text"], event["seconds"], versions, facts
                        )
                        done += 1
                        began, limit = time.time(), START
                        if event["sick"]:  # its GPU answers no more
                            return done
                if done == len(cases):
                    break
                took = time.time() - began
                if not more:  # the pipe is closed: the process is gone, or as good as gone
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(5.0)
                    reason = f"{_cause(process.returncode)}: {_tail(log, said)}"
                    self._end(cases[done], "crashed", reason, took, versions)
                    return done + 1
                if self._stop.is_set() or time.time() >= settings.deadline:
                    self._end(cases[done], "no time", "the block's share is over", took, versions)
                    return done + 1
                if took >= limit:
                    reason = f"killed after {took:.0f} s: {_tail(log, said)}"
                    self._end(cases[done], "hang", reason, took, versions)
                    return done + 1
            return done
        finally:
            os.close(ours)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if done == len(cases):  # nothing is left to do but to end
                    process.wait(min(5.0, max(0.0, self.end - time.time())))
            _kill(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            self._groups.discard(process.pid)

    def _environment(self, case: Case, settings: Settings) -> dict[str, str]:
        """Of a child: caches that need no home, and threads for its share of the cores."""
        cache = settings.cache
        found = {
            "OMP_NUM_THREADS": str(min(8, settings.cores)),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "CUDA_CACHE_PATH": str(cache / "cuda"),
        } | os.environ
        home = found.get("HOME", "")
        if not os.path.isdir(home) or not os.access(home, os.W_OK):
            found["HOME"] = str(cache)
        if settings.device == "cpu" and case.backend == "triton":
            found["TRITON_INTERPRET"] = "1"
        return found | dict(case.environment)

    def _row(self, case: Case, row: dict[str, Any], versions: dict[str, Any]) -> None:
        own = {"block": case.block, "key": case.key, "name": case.name}
        own |= {"backend": case.backend, "dtype": case.dtype}
        row = {"what": case.name, "status": "ok"} | row
        self.journal.write(own | row | {"versions": versions})

    def _end(
        self,
        case: Case,
        status: str,
        text: str,
        seconds: float,
        versions: dict[str, Any],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """The last row of a case: its own status, or the worst of its rows."""
        rows = [row for row in self.journal.rows if row["key"] == case.key]
        worst = max((status, *(row["status"] for row in rows)), key=STATUSES.index)
        texts = [text, *(row.get("text", "") for row in rows if row["status"] in BAD)]
        text = "; ".join(filter(None, texts))
        row = {"what": "case", "status": worst, "text": text, "took": seconds}
        self._row(case, row | (facts or {}), versions)


def _receive(pipe: int, seconds: float) -> tuple[bytes, bool]:
    """What arrives within the time, and whether there can be more."""
    if not select.select([pipe], [], [], seconds)[0]:
        return b"", True
    found = os.read(pipe, 1 << 16)
    return found, bool(found)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _cause(code: int | None) -> str:
    if code is None:
        return "closed its pipe and did not end"
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"


def _tail(path: Path, start: int) -> str:
    with contextlib.suppress(OSError):
        text = path.read_bytes()[start:][-4 * TAIL :].decode(errors="replace")
        return text.partition("\nExtension modules: ")[0].strip()[-TAIL:]
    return ""


def _file_name(case: Case) -> str:
    text = (case.shard and "/".join((case.block, case.shard, case.backend))) or case.key
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)
