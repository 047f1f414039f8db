"""The package at another git ref as a contender: ``--base <ref>``.

The ref is checked out into a temporary worktree, built there where it has a ``setup.py``, and runs
in a worker process with today's benchmark code. The worker takes its turns with the contenders of
this process, sample by sample, so both versions meet the same machine.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..workloads.workload import Workload
from .clock import Sampler
from .sheet import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]


class Base:
    """A worktree of ``ref`` and a worker in it, until ``close``."""

    def __init__(self, ref: str, device: str) -> None:
        found = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        if found.returncode:
            raise BenchmarkError(f"--base {ref!r} is no commit, branch or tag of this repository")
        self.ref = ref
        self._folder = Path(tempfile.mkdtemp(prefix="attnpool-base-"))
        self._tree = self._folder / "tree"
        self._process: subprocess.Popen | None = None
        made = _git("worktree", "add", "--detach", str(self._tree), found.stdout.strip())
        if made.returncode:
            self.close()
            raise BenchmarkError(f"--base {ref!r}: no worktree: {made.stderr.strip()}")
        try:
            self._start(device)
        except BaseException:
            self.close()
            raise

    def _start(self, device: str) -> None:
        if (self._tree / "setup.py").exists():
            print(f"building {self.ref} ...", file=sys.stderr, flush=True)
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            own = {"ATTNPOOL_BUILD": device, **os.environ}  # no CUDA kernels for a run on the CPU
            built = subprocess.run(
                command, cwd=self._tree, env=own, capture_output=True, text=True, check=False
            )
            if built.returncode:
                last = (built.stderr.strip().splitlines() or ["no output"])[-1]
                print(f"--base: {self.ref} was not built: {last}", file=sys.stderr)
        links = self._folder / "links"
        links.mkdir()
        (links / "attnpool_kernels").symlink_to(self._tree / "attnpool_kernels")
        (links / "benchmarks").symlink_to(ROOT / "benchmarks")
        environment = {**os.environ, "PYTHONPATH": str(links)}
        threads = str(torch.get_num_threads())
        command = [sys.executable, "-m", "benchmarks.measuring.base", device, threads]
        self._process = subprocess.Popen(
            command, cwd=links, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        where = self._receive()
        if not str(where).startswith(str(self._tree)):
            raise BenchmarkError(f"--base {self.ref!r} would have run {where}, not its own tree")

    def sampler(self, work: Workload, what: str, name: str) -> Sampler | str:
        """Prepares a point in the worker; a sampler, or the reason why there is none."""
        answer = self._ask(("prepare", work, what, name))
        if isinstance(answer, str):
            return answer

        def sample() -> float:
            return self._ask(("sample",))

        return sample

    def _ask(self, message: tuple):
        assert self._process is not None and self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; _receive says how
        return self._receive()

    def _receive(self):
        assert self._process is not None and self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise BenchmarkError(
                f"--base {self.ref!r}: its worker ended with exit code {self._process.wait()}"
            ) from None

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        _git("worktree", "remove", "--force", str(self._tree))
        shutil.rmtree(self._folder, ignore_errors=True)
        _git("worktree", "prune")


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def _serve(device: str, threads: int) -> None:
    """The worker: answers pickled messages; anything printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    import attnpool_kernels

    from ..contenders import registry
    from ..workloads.batch import make_batch
    from . import replay
    from .clock import once
    from .gate import Gate

    def reply(x: object) -> None:
        pickle.dump(x, answers)
        answers.flush()

    reply(str(Path(attnpool_kernels.__file__).resolve()))
    sample = None
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if message[0] == "sample":
            reply(sample())
            continue
        _, work, what, name = message
        try:
            contender = registry.CONTENDERS[name]
            batch = make_batch(work, device)
            batch.prepare(what)
            call = contender.prepare(batch)
            error = Gate(batch, what).error(batch.run(call, what))[1]
            if error:
                reply(f"wrong: {error}")
                continue

            def again(batch=batch, call=call, what=what):
                return batch.run(call, what)

            sample, _ = replay.of_batch(batch, call, what, once(again, device))
            reply(0.0)
        except Exception as error:
            reply(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
