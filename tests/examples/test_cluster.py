"""The examples for clusters call the command that ``torchrun`` calls on one machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "examples/cluster"
COMMAND = ["predict", "my molecules.xyz", "runs/a", "--output", "t.csv"]


def slurm(folder, *command, **variables):
    """What the script hands to srun, a word a line."""
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node1; echo node2")):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    environment = {**os.environ, **job, "SLURM_GPUS_ON_NODE": "4", **variables}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    found = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.splitlines()


def test_slurm(tmp_path):
    words = slurm(tmp_path, *COMMAND)
    assert words[0] == "torchrun" and words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--nproc_per_node") + 1] == "4"
    assert words[words.index("--rdzv_endpoint") + 1] == "node1:29500"
    assert words[words.index("-m") + 1 :] == ["attnpool_kernels.zoo", *COMMAND]


def test_slurm_resumes_a_job_that_was_requeued(tmp_path):
    fit = ["fit", "--config", "qm9_schnet_abp", "--output", "a"]
    assert slurm(tmp_path, *fit)[-1] == "a"
    assert slurm(tmp_path, *fit, SLURM_RESTART_COUNT="1")[-1] == "a"  # before a checkpoint
    (tmp_path / "a").mkdir()
    for name in ("best.ckpt", "last.ckpt"):  # in this order they are written
        (tmp_path / "a" / name).touch()
        assert slurm(tmp_path, *fit, SLURM_RESTART_COUNT="1")[-2:] == ["--ckpt_path", "last"]
    assert slurm(tmp_path, *COMMAND, SLURM_RESTART_COUNT="1")[-1] == "t.csv"


def test_ray_is_asked_for_in_one_line():
    found = subprocess.run(
        [sys.executable, "-c", "import sys, runpy; sys.modules['ray'] = None; "
         f"runpy.run_path({str(CLUSTER / 'with_ray.py')!r})"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "needs ray: pip install ray" in found.stderr


def test_ray_starts_torchrun():
    pytest.importorskip("ray")
    import runpy

    made = runpy.run_path(str(CLUSTER / "with_ray.py"))["torchrun"](1, 2, 4, ("n1", 1234))
    assert made[-2:] == ["-m", "attnpool_kernels.zoo"]
    assert "--nnodes 2 --nproc_per_node 4 --node_rank 1 --master_addr n1" in " ".join(made)
