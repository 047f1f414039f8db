"""``fit``, ``test`` and ``predict`` in two processes: uneven batches, the numbers of one."""

import csv
import os
import subprocess
import sys

import ase.io
import pytest
from tools import tiny

from attnpool_kernels.zoo import __main__ as cli

from .test_streaming import frames

# 32 molecules to train on, 4 to validate and 5 to test with: in batches of 9 and of 3 the last ones
# have 5, 4 and 2, which two processes cannot always halve.
SMALL = [
    *("--config", "qm7b_small_abp", "--trainer.accelerator", "cpu"),
    *("--task.pooling_options", "{hidden: 16, heads: 2, seeds: 2}"),
    *("--task.backbone_options", "{hidden_channels: 16, num_filters: 16, num_interactions: 1}"),
    *("--data.batch_size", "9", "--trainer.max_epochs", "2", "--task.lr", "0.001"),
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
# One start of processes for the three commands: to import everything takes longest.
PROGRAM = """
import sys
from attnpool_kernels.zoo.__main__ import main

for command in sys.argv[1].split(" // "):
    if code := main(command.split("  ")):
        sys.exit(code)
"""


def commands(folder, qm7b):
    fit = ["fit", *SMALL, "--data.path", qm7b, "--output", folder]
    test = ["test", "--ckpt_path", folder, "--batch_size", "3", "--trainer.accelerator", "cpu"]
    predict = ["predict", "m.xyz", f"{folder}/last.ckpt", "--output", f"{folder}.csv"]
    return fit, test, [*predict, "--part_size", "6"]


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def close(one, two, rel):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            try:
                assert float(value) == pytest.approx(float(b[name]), rel=rel, abs=1e-6), name
            except ValueError:
                assert value == b[name] or name == "checkpoint"


def test_two_processes_do_as_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qm7b = str(tiny.write_qm7b(tmp_path / "qm7b_small.npz", 41))
    ase.io.write("m.xyz", frames(40), format="extxyz")
    argv = " // ".join("  ".join(x) for x in commands("two", qm7b))
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    found = subprocess.run(
        [*TORCHRUN, "--nproc_per_node=2", "program.py", argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("best by the validation loss") == 1  # one process speaks
    assert found.stderr.count("40 molecules") == 1
    for given in commands("one", qm7b):
        assert cli.main(given) == 0
    close(table("one/logs/version_0/metrics.csv"), table("two/logs/version_0/metrics.csv"), 1e-4)
    close(table("one/test.csv"), table("two/test.csv"), 1e-3)
    close(table("one.csv"), table("two.csv"), 2e-3)
    assert [int(row["molecule"]) for row in table("two.csv")] == list(range(40))
    assert not (tmp_path / "two.csv.parts").exists()
