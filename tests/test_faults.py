"""What goes wrong around a call: signals, forks, threads and memory that runs out.

What needs a process of its own runs ``main`` of this file there.
"""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from attnpool_kernels import Ragged, seed_pool, set_attention

ATOMS = Ragged.from_counts([7, 0, 31, 64, 1, 20, 100])


def inputs(scale=1):
    g = torch.Generator().manual_seed(0)
    n = ATOMS.last
    return [torch.randn(n, 2 * scale, 16, generator=g).requires_grad_() for _ in range(3)]


def passes(q, k, v, atoms=ATOMS):
    """Forward, backward and double backward; every tensor that they give."""
    out = set_attention(q, k, v, atoms)
    first = torch.autograd.grad(out.square().sum(), [q, k, v], create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), [q, k, v])
    return [x.detach() for x in (out, *first, *second)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def elsewhere(what):
    """Runs a function of this file in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, f"{found.returncode}\n{found.stdout}{found.stderr}"
    return found.stdout


class Interrupt(Exception):
    pass


def test_a_handler_that_returns_changes_nothing():
    given = inputs()
    wanted, calls = passes(*given), []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        while len(calls) < 20:
            assert same(passes(*given), wanted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_a_handler_that_raises_leaves_the_next_call_right(number):
    """As of Ctrl-C: it arrives, the inputs are as they were, the next call is right."""
    given = inputs()
    wanted, copies = passes(*given), [x.detach().clone() for x in given]

    def stop(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, stop)
    also = signal.signal(signal.SIGINT, stop)
    arrived = 0
    try:
        for step in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + step))
                while True:
                    passes(*given)
                    if number == signal.SIGINT:
                        os.kill(os.getpid(), number)
            except Interrupt:
                arrived += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert same(given, copies)
    except Interrupt:  # the other one of two that came together
        arrived += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, also)
    assert arrived >= 10 and same(passes(*given), wanted)
    assert all(x.grad is None for x in given)


def test_an_error_in_one_thread_is_no_error_of_another():
    given = inputs()
    wanted, wrong, right = passes(*given), [], []

    def bad():
        q, k, v = given
        for _ in range(30):
            try:
                set_attention(q, k[:-1], v, ATOMS)
            except ValueError as error:
                wrong.append(str(error))

    def good():
        for _ in range(10):
            right.append(same(passes(*inputs()), wanted))

    threads = [threading.Thread(target=f) for f in (bad, good, bad, good)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(wrong) == 60 and len(set(wrong)) == 1 and "k and v" in wrong[0]
    assert right == [True] * 20


class Pooled(torch.utils.data.Dataset):
    """Computes in a worker; fails at one item."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        k = torch.full((5, 2, 8), float(i))
        ptr = [0, 5] if i != 4 else [0, 6]
        return seed_pool(torch.ones(1, 2, 8), k, k, torch.tensor(ptr))[0, 0, 0, 0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    """They compute, and an error of theirs is that of the caller."""
    loader = torch.utils.data.DataLoader(
        Pooled(), batch_size=1, num_workers=1, multiprocessing_context=method
    )
    found = []
    with pytest.raises(ValueError, match=r"ptr\[-1\]"):
        found.extend(map(float, loader))
    assert found == [0.0, 1.0, 2.0, 3.0]


def test_a_forked_process_after_threads():
    assert "the same in 3 processes" in elsewhere("fork")


def test_memory_that_runs_out():
    """Every allocation of a pass fails in turn: an error, inputs intact, the next call right."""
    out = elsewhere("memory")
    failed, served = (int(x) for x in out.split()[-2:])
    assert failed >= 4 and served >= 1, out


def fork():
    """torch's own operators hang in such a process where they would use threads; ours do not."""
    torch.set_num_threads(4)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 4, 32, generator=g)
    ptr = Ragged.from_counts([40] * 40)
    wanted = set_attention(x, x, x, ptr, backend="cpu").numpy().tobytes()
    pids = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            signal.alarm(120)
            found = set_attention(x, x, x, ptr, backend="cpu").numpy().tobytes()
            os._exit(0 if found == wanted else 3)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0, 0], codes
    assert set_attention(x, x, x, ptr, backend="cpu").numpy().tobytes() == wanted
    print("the same in 3 processes")


def memory():
    """Less and less address space; where it is too little, torch or the kernels raise."""
    torch.set_num_threads(2)
    given = inputs(scale=16)
    wanted, copies = passes(*given), [x.detach().clone() for x in given]
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    failed, served, said = 0, 0, []
    for extra in [*range(0, 3000, 250), 400_000]:  # kB
        gc.collect()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (extra << 10), unlimited[1]))
        try:
            found = passes(*given)
            served += 1
        except (RuntimeError, MemoryError) as error:
            found = None
            failed += 1
            said.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        assert found is None or same(found, wanted)
        assert same(given, copies) and all(x.grad is None for x in given)
        del found
    assert same(passes(*given), wanted)
    assert all("memory" in text for text in said), said
    print(failed, served)


if __name__ == "__main__":
    {"fork": fork, "memory": memory}[sys.argv[1]]()
