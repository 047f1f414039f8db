"""A few hundred rounds of what ``make soak`` does thousands of times, and that it can fail."""

import os
import threading

import pytest
import torch
from tools import soak

ROUNDS = {"operators": 120, "modules": 60, "forces": 40, "calculator": 60, "fits": 5}


@pytest.mark.parametrize("name", ROUNDS)
def test_nothing_is_left_over(name):
    work, _ = soak.WORK[name]
    steps = work()
    with soak.silent():
        for _ in range(20 if name != "fits" else 3):  # what is made once
            next(steps)
        found = soak.soak(steps, ROUNDS[name], samples=10)
    assert found.problems(anonymous_only=True) == []


def leaking(what):
    kept, go = [], threading.Event()
    try:
        while True:
            if what == "memory":
                kept.append(torch.ones(4096))  # 16 kB, 3 MB in 200 rounds
            elif what == "files":
                kept.append(os.open(__file__, os.O_RDONLY))
            elif what == "threads":
                kept.append(threading.Thread(target=go.wait))
                kept[-1].start()
            yield
    finally:
        go.set()
        for x in kept:
            if what == "files":
                os.close(x)
            elif what == "threads":
                x.join()


@pytest.mark.parametrize("what", ["memory", "files", "threads"])
def test_a_planted_leak_is_found(what):
    steps = leaking(what)
    found = soak.soak(steps, 200 if what == "memory" else 10, samples=10)
    steps.close()
    assert len(found.problems(anonymous_only=True)) == 1
    assert what in found.problems(anonymous_only=True)[0]


def test_growth_is_the_slope_of_the_line():
    assert soak.growth([10, 20, 30, 40], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.0)
    assert soak.growth([10, 20, 30, 40], [5.0, 5.0, 5.0, 5.0]) == pytest.approx(0.0)


def test_the_committed_table():
    """Of the whole runs: flat, and of as many rounds as the program takes."""
    with open(soak.TABLE, newline="") as file:
        rows = {x["work"]: x for x in soak.csv.DictReader(file)}
    assert rows
    for name, row in rows.items():
        assert int(row["rounds"]) == soak.WORK[name][1] and row["verdict"] == "flat"
        assert float(row["resident_growth_mb"]) < float(row["limit_mb"]) == soak.LIMIT
        assert row["files_left"] == row["threads_left"] == "0"
