"""The table of configurations: every one builds; every format and backbone trains and resumes.

What is sampled, and why: widths of a configuration do not depend on its data set but for QM7b (its
cutoffs) and OE62 (its set-up), so each distinct model is built once. A step and a resumed one are
taken for every pair of a format and a backbone, with small widths, since what may go wrong there is
the format, the targets and the split; the poolings take turns, so that each has one.
"""

import functools
import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from tools import tiny
from tools.small import molecules

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import grid, run
from attnpool_kernels.zoo.data import Batch, MoleculeData
from attnpool_kernels.zoo.datasets import DATASETS, load, oe62, qm8, qmugs
from attnpool_kernels.zoo.task import PoolingTask

from .datasets import test_md17, test_oe62, test_qm

TABLE = [name for name in grid.names() if (grid.FILES / f"{name}.yaml") not in grid.files()]


def models():
    """Distinct models of the table, with the first name of each."""
    found = {}
    for name in TABLE:
        task = grid.settings(name)["task"] | {"targets": ["energy"]}
        found.setdefault(json.dumps(task, sort_keys=True), name)
    return found


@pytest.fixture
def quick(monkeypatch):
    """Orthogonal weights and zeros of Bessel functions are most of what makes DimeNet slow."""
    utils = pytest.importorskip("torch_geometric.nn.models.dimenet_utils")
    monkeypatch.setattr(torch.nn.init, "orthogonal_", torch.nn.init.normal_)
    monkeypatch.setattr(utils, "Jn_zeros", functools.cache(utils.Jn_zeros))


def test_every_name_has_data_and_a_text(tmp_path):
    assert len(TABLE) == 12 * 4 * 7 + 2 * 4 * 8 and len(set(grid.names())) == len(grid.names())
    for name in TABLE:
        found = grid.settings(name)
        data = MoleculeData(targets=found["task"]["targets"], **found["data"])
        row = DATASETS[data.dataset]
        assert set(data.names) <= {t.name for t in row.targets}, name
        assert set(data.options) <= set(row.options), name
        assert data.split_seed in (*row.seeds, 42) and found["patience"] > 0
        run.TrainerOptions(**found["trainer"])
    for name in TABLE[::29]:
        assert yaml.safe_load(grid.text(name)) == grid.settings(name)
    for old, new in grid.OLD.items():
        assert grid.text(old) == grid.text(new)


def test_every_model_builds(quick):
    for task, name in models().items():
        assert sum(p.numel() for p in PoolingTask(**json.loads(task)).parameters()) > 1e5, name


@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("backbone", grid.BACKBONES)
def test_no_parameter_is_idle(quick, backbone, pooling):
    """DistributedDataParallel waits for every gradient; OE62 has all of the parts."""
    task = PoolingTask(**grid.settings(f"oe62_homo_{backbone}_{pooling}")["task"])
    given = tiny.molecules(3, 1)
    task._predicted(Batch(given, 3, len(given.z)))[0].backward()
    assert not [n for n, p in task.model.named_parameters() if p.grad is None]


def test_published_hyperparameters():
    found = grid.settings("oe62_homo_schnet_abp3")
    assert found["task"]["atom_layers"] == [64, 32, 16, 128]
    assert found["task"]["pooling_options"]["encoder_blocks"] == 3
    assert grid.settings("oe62_lumo_schnet_softmax")["task"]["head_layers"] == [64, 32, 16]
    assert grid.settings("qm7b_schnet_abp")["task"]["backbone_options"]["cutoff"] == 5.29177
    assert grid.settings("qm9_schnet_sum")["task"]["backbone_options"]["cutoff"] == 10.0
    model = PoolingTask(**grid.settings("oe62_homo_schnet_abp")["task"]).model
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith("pooling."))
    assert count == 14_205_056  # of the original program


def test_perceptron_before_the_pooling_says_what_cannot_be():
    given = {"backbone": "schnet", "targets": ["a"], "pooling_options": {}}
    for options, said in (
        ({"pooling": "sum", "head": "atom", "atom_layers": [4]}, "atom_layers must be None"),
        ({"pooling": "weighted", "head_layers": [4]}, "head_layers must be None"),
        ({"pooling": "sum", "atom_layers": []}, "at least one width"),
        ({"pooling": "sum", "atom_layers": [0]}, "atom_layers"),
    ):
        with pytest.raises(ValueError, match=said):
            PoolingTask(**given | options)


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """A tiny file of every format, by data set."""
    root, atoms, rng = tmp_path_factory.mktemp("formats"), molecules(), np.random.default_rng(0)
    paths = {name: root / name for name in DATASETS}
    for path in paths.values():
        path.mkdir()
    tiny.write_qm7b(paths["qm7b"] / "qm7b.npz")
    test_qm.write_list(paths["qm8"] / qm8.FILE, atoms, rng.random((18, 16)))
    test_qm.write_qm9(paths["qm9"] / "raw", atoms)
    test_qm.write_list(paths["qmugs"] / qmugs.FILE, atoms, rng.random((18, 21)))
    with zipfile.ZipFile(paths["md17"] / "ethanol_ccsd_t.zip", "w") as archive:
        for part, frames in (("train", 12), ("test", 8)):
            np.savez(root / "part.npz", **test_md17.trajectory(frames))
            archive.write(root / "part.npz", f"ethanol_ccsd_t-{part}.npz")
    test_oe62.write_ase(paths["oe62"] / oe62.FILE, atoms, test_oe62.properties(atoms))
    test_oe62.write_splits(paths["oe62"] / "splits")
    return paths


ROWS = {"md17": "md17_ethanol", "oe62": "oe62_lumo"}
PAIRS = [(name, backbone) for name in DATASETS for backbone in grid.BACKBONES]
# Every pooling once at least; only OE62, the last, has coefficients for OWA.
TURNS = ["abp", "sum", "mean", "max", "softmax", "weighted", "abp3"]
SMALL = {
    "schnet": {"hidden_channels": 16, "num_filters": 16, "num_interactions": 1},
    "schnetpack_schnet": {"n_atom_basis": 16, "n_interactions": 1, "n_rbf": 8},
    "dimenet++": {"hidden_channels": 16, "num_blocks": 1, "out_emb_channels": 16, "latent": 16},
    "painn": {"n_atom_basis": 16, "n_interactions": 1},
    "dimenet": {"hidden_channels": 16, "num_blocks": 1, "latent": 16},
}


def cases():
    for number, (name, backbone) in enumerate(PAIRS):
        pooling = TURNS[number % len(TURNS)]
        if (name, backbone) == ("oe62", "dimenet++"):
            pooling = "owa"
        yield f"{ROWS.get(name, name)}_{backbone}_{pooling}"


def test_the_sample_has_every_pooling():
    assert {grid.parts(name)[2] for name in cases()} == set(grid.POOLINGS)


@pytest.mark.parametrize("name", list(cases()))
def test_a_step_and_a_resumed_one(name, formats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = grid.settings(name)
    kind, data = found["task"]["backbone"], found["data"]["dataset"]
    argv = ["fit", "--config", name, "--output", "a", "--trainer.accelerator", "cpu"]
    argv += ["--data.path", str(formats[data])]
    argv += ["--task.backbone_options", json.dumps(SMALL[kind])]
    if found["task"]["pooling"] == "abp":
        options = found["task"]["pooling_options"] | {"hidden": 16, "heads": 2}
        argv += ["--task.pooling_options", json.dumps(options)]
    for epochs, more in ((1, []), (2, ["--ckpt_path", "last"])):
        code = cli.main([*argv, "--trainer.max_epochs", str(epochs), *more])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert f"epoch {epochs - 1}  train/loss" in out
        assert torch.load("a/last.ckpt", weights_only=True)["global_step"] == epochs


def test_sizes_of_qmugs(formats):
    whole = load("qmugs", formats["qmugs"]).split()
    some = load("qmugs", formats["qmugs"], train=5).split()
    assert torch.equal(some.train, whole.train[:5]) and torch.equal(some.test, whole.test)
    for wrong in (0, 15, True, "x"):
        with pytest.raises(ValueError, match="train must be an int from 1 to 14"):
            load("qmugs", formats["qmugs"], train=wrong)


def test_listing(capsys):
    for words, wanted in (
        ([], "POOLING"),
        (["qm9", "abp3"], "qm9_dimenet++_abp3"),
        (["oe62_*_owa"], "oe62_lumo_painn_owa"),
        (["qm7b_dimenet_abp"], "backbone: dimenet++"),
    ):
        assert cli.main(["configs", *words]) == 0
        assert wanted in capsys.readouterr().out
    assert cli.main(["configs", "nix"]) == 1
    assert "no configuration matches nix" in capsys.readouterr().err
