"""The command line: what it writes, what it resumes, what it refuses, and two processes."""

import csv
import os
import signal
import subprocess
import sys

import jsonargparse
import pytest
import torch
from tools import tiny

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import grid, predict, run
from attnpool_kernels.zoo.data import MoleculeData
from attnpool_kernels.zoo.task import PoolingTask

SMALL = [
    "--config",
    "qm7b_small_abp",
    "--task.pooling_options",
    "{hidden: 16, heads: 2, seeds: 2}",
    "--task.backbone_options",
    "{hidden_channels: 16, num_filters: 16, num_interactions: 1}",
    "--trainer.accelerator",
    "cpu",
    "--data.batch_size",
    "8",
]


@pytest.fixture(scope="module")
def qm7b(tmp_path_factory):
    return tiny.write_qm7b(tmp_path_factory.mktemp("data") / "qm7b_small.npz")


@pytest.fixture
def zoo(tmp_path, monkeypatch, capsys, qm7b):
    """Runs a command line in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def go(*argv):
        if argv[:1] == ("fit",):
            argv = ("fit", *SMALL, "--data.path", str(qm7b), *argv[1:])
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return go


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder, version=0):
    """Validation loss by epoch, from the log."""
    found = rows(folder / f"logs/version_{version}/metrics.csv")
    return {int(r["epoch"]): float(r["val/loss"]) for r in found if r["val/loss"]}


def test_fit_test_predict(zoo, tmp_path, qm7b):
    # A learning rate that spoils the model after the first epochs: the last is not the best.
    options = ("--trainer.max_epochs", 6, "--task.lr", 0.05, "--task.targets", "[homo_gw,lumo_gw]")
    code, out, err = zoo("fit", *options, "--output", "a")
    assert code == 0 and "warn" not in (out + err).lower(), err
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 6
    folder = tmp_path / "a"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"config.yaml", "best.ckpt", "last.ckpt", "logs/version_0/metrics.csv"} <= names
    assert any("tfevents" in name for name in names)
    by_epoch = losses(folder)
    best = min(by_epoch, key=by_epoch.get)
    assert len(by_epoch) == 6 and best != 5
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] == best
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 5
    assert "a/best.ckpt" in out

    code, out, _ = zoo("test", "--ckpt_path", "a")
    assert code == 0 and "a/best.ckpt" in out and "homo_gw" in out and "eV" in out
    task = predict.load_task(folder)
    data = MoleculeData("qm7b", str(qm7b), targets=["homo_gw", "lumo_gw"], split=23887)
    given = data.ready.select(data.parts["test"])
    with torch.no_grad():
        wanted = (task(given) - given.y).abs().mean(0)
    found = rows(folder / "test.csv")
    assert [r["target"] for r in found] == ["homo_gw", "lumo_gw"]
    assert [float(r["mae"]) for r in found] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert found[0]["unit"] == "eV" and found[0]["checkpoint"] == "a/best.ckpt"
    assert found[0]["molecules"] == "4"

    (tmp_path / "m.xyz").write_text("3\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n2\n\nO 0 0 0\nH 0 0 1\n")
    code, out, err = zoo("predict", "m.xyz", "a", "--output", "m.csv")
    assert code == 0 and out == "" and "a/best.ckpt, 2 molecules" in err
    code, out, _ = zoo("predict", "m.xyz", "a/last.ckpt")
    written, printed = rows(tmp_path / "m.csv"), list(csv.DictReader(out.splitlines()))
    assert [r["formula"] for r in written] == ["H2O", "HO"]
    assert set(written[0]) == {"molecule", "formula", "atoms", "homo_gw [eV]", "lumo_gw [eV]"}
    assert written[0]["homo_gw [eV]"] != printed[0]["homo_gw [eV]"]  # best is not last

    (tmp_path / "b.xyz").write_text("1\n\nBr 0 0 0\n")
    code, out, err = zoo("predict", "b.xyz", "a", "--output", "b.csv")
    assert code == 1 and "has Br" in err and not (tmp_path / "b.csv").exists()

    data = (folder / "best.ckpt").read_bytes()
    (tmp_path / "short.ckpt").write_bytes(data[: len(data) // 2])
    for argv in (("test", "--ckpt_path", "short.ckpt"), ("predict", "m.xyz", "short.ckpt")):
        code, out, err = zoo(*argv)
        assert code == 1 and err.startswith("error: short.ckpt is damaged"), err
    assert not (tmp_path / "test.csv").exists()


def test_resumed_is_the_same_as_not_interrupted(zoo, tmp_path):
    options = [
        "--task.schedule",
        "plateau",
        "--task.schedule_options",
        "{patience: 0, factor: 0.5}",
    ]
    assert zoo("fit", *options, "--output", "whole", "--trainer.max_epochs", 4)[0] == 0
    assert zoo("fit", *options, "--output", "parts", "--trainer.max_epochs", 2)[0] == 0
    config = (tmp_path / "parts/config.yaml").read_text()
    code, _, err = zoo("fit", *options, "--output", "parts")
    assert code == 1 and "output must be a new folder" in err and "--ckpt_path last" in err
    assert (tmp_path / "parts/config.yaml").read_text() == config
    code, out, _ = zoo(
        "fit", *options, "--output", "parts", "--trainer.max_epochs", 4, "--ckpt_path", "last"
    )
    assert code == 0 and "epoch 2 " in out and "epoch 1 " not in out
    whole, parts = (
        torch.load(tmp_path / x / "last.ckpt", weights_only=True) for x in ("whole", "parts")
    )
    assert whole["epoch"] == parts["epoch"] == 3
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, parts["state_dict"][name]), name
    there = losses(tmp_path / "parts", 0) | losses(tmp_path / "parts", 1)
    assert there == losses(tmp_path / "whole")
    for change, said in (
        (("--task.pooling", "sum", "--task.pooling_options", "{}"), "pooling is 'abp' there"),
        (("--task.targets", "[lumo_gw]"), "targets is ['homo_gw'] there and ['lumo_gw'] here"),
        (("--data.split", 386333), "split is 23887 there and 386333 here"),
    ):
        code, _, err = zoo("fit", *change, "--output", "parts", "--ckpt_path", "last")
        assert code == 1 and "of another model" in err and said in err
    code, _, _ = zoo("fit", "--config", "whole/config.yaml", "--output", "c")
    assert code == 0  # what a run wrote is a configuration


def test_early_stopping(zoo, tmp_path):
    code, out, _ = zoo("fit", "--task.lr", 1e-30, "--patience", 2, "--output", "a")
    assert code == 0 and "stopped after epoch 2; best by the validation loss: epoch 0" in out


def options(*pairs):
    return pytest.mark.parametrize(("given", "message"), pairs, ids=lambda x: str(x)[:40])


def trainer(text):
    return ["--trainer.options", text]


def schedule(name, text):
    return ["--task.schedule", name, "--task.schedule_options", text]


@options(
    (["--task.targets", "[homo]"], "target must be one of first_excitation_zindo"),
    (["--task.targets", "[]"], "targets must name at least one target"),
    (["--task.targets", "[homo_gw,homo_gw]"], "targets must differ from each other"),
    (["--task.forces", "true"], "forces must be in the data"),
    (["--task.pooling", "nix"], "pooling must be one of sum, mean"),
    (["--task.pooling_options", "{nix: 1}"], "nix"),
    (["--task.pooling_options", "{heads: x}"], "heads must be an int"),
    (["--task.backbone", "nix"], "backbone must be one of schnet"),
    (["--task.backbone_options", "{nix: 1}"], "'nix'"),
    (["--task.backend", "nix"], "backend must be one of"),
    (["--task.loss", "nix"], "task.loss"),
    (["--task.lr", "fast"], "task.lr"),
    (["--task.lr", "0"], "lr must be positive"),
    (["--task.force_weight", "-1"], "force_weight must be at least 0 and finite, got -1"),
    (["--task.nix", "1"], "--task.nix"),
    (["--task.schedule", "nix"], "task.schedule"),
    (["--task.schedule_options", "{patience: 3}"], "schedule_options must be empty"),
    (["--task.schedule", "cosine", "--trainer.max_epochs", "-1"], "max_epochs must be given"),
    (schedule("plateau", "{nix: 1}"), "options of schedule 'plateau' are factor, patience"),
    (schedule("plateau", "{mode: max}"), "options of schedule 'plateau' are"),
    (schedule("plateau", "{patience: -1}"), "patience of schedule 'plateau' must be an int of at"),
    (schedule("plateau", "{factor: -0.5}"), "must be between 0 and 1, got -0.5"),
    (schedule("plateau", "{min_lr: nix}"), "min_lr of schedule 'plateau' must be a number"),
    (schedule("plateau", "{threshold_mode: nix}"), "must be 'rel' or 'abs', got 'nix'"),
    (schedule("cosine", "{T_max: 3}"), "options of schedule 'cosine' are eta_min, got 'T_max'"),
    (schedule("cosine", "{eta_min: 1}"), "must be from 0 to lr, 0.0005, got 1"),
    (["--data.dataset", "nix"], "dataset must be one of qm7b, qm8"),
    (["--data.options", "{nix: 1}"], "qm7b has no option 'nix'"),
    (["--data.split", "5"], "split seed must be one of 23887, 386333"),
    (["--data.limit", "0"], "limit must be at least 1"),
    (["--data.batch_size", "0"], "batch_size must be at least 1, got 0"),
    (["--data.batch_size", "-1"], "batch_size must be at least 1, got -1"),
    (["--trainer.accelerator", "gpu"], "accelerator='gpu'"),
    (["--trainer.accelerator", "nix"], "accelerator='nix'"),
    (["--trainer.devices", "0"], "devices=0"),
    (["--trainer.devices", "nix"], "devices='nix'"),
    (["--trainer.strategy", "nix"], "strategy='nix'"),
    (["--trainer.num_nodes", "0"], "num_nodes=0"),
    (["--trainer.max_epochs", "0"], "max_epochs must be an int of at least 1 or -1, got 0"),
    (["--trainer.max_time", "soon"], "max_time='soon'"),
    (["--trainer.accumulate_grad_batches", "0"], "must be an int of at least 1, got 0"),
    (["--trainer.accumulate_grad_batches", "-1"], "must be an int of at least 1, got -1"),
    (["--trainer.gradient_clip_val", "-1"], "gradient_clip_val must be at least 0 and finite"),
    (trainer("{nix: 1}"), "options of lightning.pytorch.Trainer, got 'nix'"),
    (trainer("{callbacks: nix}"), "must not have callbacks"),
    (trainer("{logger: nix}"), "must not have logger"),
    (trainer("{precision: nix}"), "precision='nix'"),
    (trainer("{precision: 16-true}"), "precision must not be '16-true' to train"),
    (trainer("{limit_val_batches: 0}"), "limit_val_batches must not be 0"),
    (trainer("{limit_val_batches: 0.01}"), "limit_val_batches"),
    (trainer("{check_val_every_n_epoch: 0}"), "check_val_every_n_epoch must be an int of at"),
    (trainer("{val_check_interval: 0}"), "val_check_interval must be positive, got 0"),
    (trainer("{val_check_interval: 100}"), "`val_check_interval` (100) must be less"),
    (trainer("{gradient_clip_algorithm: nix}"), "gradient_clip_algorithm='nix'"),
    (trainer("{detect_anomaly: 3}"), "detect_anomaly must be true or false, got 3"),
    (trainer("{max_steps: 0}"), "max_steps must be an int of at least 1 or -1"),
    (trainer("{enable_checkpointing: false}"), "enable_checkpointing=False"),
    (trainer("[1]"), "trainer.options"),
    (["--patience", "-1"], "patience must be at least 0, got -1"),
    (["--seed", "-1"], "-1 is not in bounds"),
    (["--config", "nix"], "config must be a file or a name that `configs` lists, got 'nix'"),
    (["--output", "file"], "output must be a folder, got the file"),
    (["--nix", "1"], "--nix"),
)
def test_wrong_options_of_fit(zoo, tmp_path, given, message):
    if "gpu" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").touch()
    code, _, err = zoo("fit", "--trainer.max_epochs", 2, "--output", "out", *given)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and message in err
    late = any(x in given[-1] for x in ("interval: 100", "0.01", "16-true"))  # seen in Lightning
    assert late or [x.name for x in tmp_path.iterdir()] == ["file"]
    assert not list(tmp_path.glob("out/*.ckpt"))


@options(
    (["--data.path", "nix"], "nix does not exist"),
    (["--ckpt_path", "nix"], "ckpt_path must be a file or the folder of a run, got nix"),
    (["--ckpt_path", "last"], "ckpt_path must be a file"),
)
def test_missing_files(zoo, tmp_path, given, message):
    code, _, err = zoo("fit", *given, "--output", "out")
    assert (code, err.count("\n")) == (1, 1) and err.startswith("error: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_is_too_large(zoo):
    code, _, err = zoo("fit", "--task.lr", "1e30", "--trainer.max_epochs", 3, "--output", "out")
    assert code == 1 and "validation loss of nan" in err and "Traceback" not in err


@pytest.fixture(scope="module")
def folder(tmp_path_factory, qm7b):
    """A trained run and a molecule."""
    place = tmp_path_factory.mktemp("runs")
    argv = [*SMALL, "--data.path", qm7b, "--trainer.max_epochs", 1, "--output", place / "run"]
    assert cli.main([str(x) for x in ("fit", *argv)]) == 0
    (place / "m.xyz").write_text("3\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
    return place


@options(
    ("test RUN --batch_size 0", "batch_size must be at least 1, got 0"),
    ("test RUN --batch_size -1", "batch_size must be at least 1, got -1"),
    ("test RUN --trainer.accelerator gpu", "accelerator='gpu'"),
    ("test RUN --trainer.devices 0", "devices=0"),
    ("test RUN --trainer.options {nix:1}", "trainer.options"),
    ("test RUN --trainer.options {limit_test_batches:\xa00}", "limit_test_batches must not be 0"),
    ("test RUN --trainer.max_epochs 3", "--trainer.max_epochs"),
    ("test", "ckpt_path"),
    ("predict XYZ RUN --batch_size 0", "batch_size must be at least 1, got 0"),
    ("predict XYZ RUN --batch_size -1", "batch_size must be at least 1, got -1"),
    ("predict XYZ RUN --batch_size x", "batch_size"),
    ("predict XYZ RUN --device gpu", "device must be one of this machine"),
    ("predict XYZ RUN --device nix", "device must be one of this machine"),
    ("predict XYZ RUN --device cuda:99", "device must be one of this machine"),
    ("predict XYZ RUN --device meta", "device must be one of this machine"),
    ("predict XYZ", "ckpt_path"),
    ("predict XYZ RUN --nix 1", "--nix"),
    ("configs --nix", "--nix"),
    ("nix", "'nix'"),
    ("", "subcommand"),
)
def test_wrong_options_of_the_other_commands(zoo, folder, given, message):
    names = {"RUN": f"--ckpt_path={folder / 'run'}", "XYZ": str(folder / "m.xyz")}
    if given.startswith("predict"):
        names["RUN"] = str(folder / "run")
    argv = [names.get(x, x.replace("\xa0", " ")) for x in given.split(" ") if x]
    if "gpu" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = zoo(*argv)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and message in err
    assert not (folder / "run/test.csv").exists()


def test_a_trial_of_test_counts_what_it_tested(zoo, folder, tmp_path):
    argv = ("--ckpt_path", folder / "run", "--output", "t.csv", "--batch_size", 3)
    code, out, _ = zoo("test", *argv, "--trainer.options", "{fast_dev_run: true}")
    assert code == 0 and "3 molecules" in out and rows(tmp_path / "t.csv")[0]["molecules"] == "3"
    code, out, _ = zoo("test", *argv)
    assert code == 0 and "4 molecules" in out and rows(tmp_path / "t.csv")[0]["molecules"] == "4"


def test_the_configuration_of_a_resumed_run_starts_anew(zoo, tmp_path):
    assert zoo("fit", "--output", "a", "--trainer.max_epochs", 1)[0] == 0
    for path in ("last", "a/last.ckpt", "a"):
        code, out, _ = zoo(
            "fit",
            "--config",
            "a/config.yaml",
            "--output",
            "a",
            "--ckpt_path",
            path,
            "--trainer.max_epochs",
            9,
            "--task.lr",
            "2e-5",
        )
        text = (tmp_path / "a/config.yaml").read_text()
        assert code == 0 and "last.ckpt" not in text and "ckpt_path: a" not in text
        assert "lr: 2.0e-05" in text and "max_epochs: 9" in text
        if path == "last":
            assert "from here on it is 2e-05" in out
    code, out, _ = zoo("fit", "--config", "a/config.yaml", "--output", "b")
    assert code == 0 and "epoch 0 " in out
    code, out, _ = zoo("fit", "--config", "b/config.yaml", "--output", "b", "--ckpt_path", "last")
    assert code == 0 and out.startswith("nothing left to do for b/last.ckpt: ")


def test_sigterm_is_not_success(tmp_path, qm7b):
    argv = [*SMALL, "--data.path", str(qm7b), "--output", "a", "--patience", "1000000"]
    command = [sys.executable, "-m", "attnpool_kernels.zoo", "fit", *argv]
    command += ["--trainer.max_epochs", "-1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2 "):
                process.terminate()
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err and err.count("\nerror:") + err.startswith("error:") == 1
    assert "stopped by SIGTERM" in err and "--ckpt_path last" in err
    assert torch.load(tmp_path / "a/last.ckpt", weights_only=True)["epoch"] >= 2


def test_help_and_list(zoo):
    code, out, _ = zoo("--help")
    assert code == 0 and all(name in out for name in ("fit", "test", "predict", "configs"))
    code, listed, _ = zoo("configs")
    assert code == 0 and "--config qm7b_small_abp" in out and "--output table.csv" in out
    for command in ("fit", "test", "predict", "configs"):
        _, out, _ = zoo(command, "--help")
        assert "example" in out and "Optional" not in out and "default: null" not in out
    for path in grid.files():
        assert f"  {path.stem} " in listed and path.read_text().startswith("# ")
    for name, parser in cli.parsers().items():
        for action in parser._actions:
            text = action.help
            if action.dest == "subcommand":
                continue
            assert text and len(text) > 5, f"{name} {action.dest} has no help"


@pytest.fixture(scope="module")
def parser():
    return cli.parsers()["fit"]


@pytest.mark.parametrize("path", grid.files(), ids=lambda path: path.stem)
def test_configurations_make_models(path, parser, tmp_path):
    """Those in files; ``test_grid`` has the table."""
    name = path.stem
    given = parser.parse_args(["--config", str(path)])
    assert isinstance(given, jsonargparse.Namespace)
    made = parser.instantiate(given)
    task, data = made.task, made.data
    assert isinstance(task, PoolingTask) and isinstance(made.trainer, run.TrainerOptions)
    from attnpool_kernels.zoo.datasets import DATASETS

    row = DATASETS[data.dataset]
    known = {t.name for t in row.module.TARGETS}
    assert set(task.hparams["targets"]) <= known and data.names == tuple(task.hparams["targets"])
    assert set(data.options) <= set(row.options)
    assert data.split_seed in row.seeds or data.split_seed == 42
    parameters = sum(p.numel() for p in task.parameters())
    assert parameters > 1e5 if "small" not in name else parameters < 1e6
    given = tiny.molecules(3, 1, forces=task.forces)
    from attnpool_kernels.zoo.data import Batch

    task._predicted(Batch(given, 3, len(given.z)))[0].backward()
    idle = [n for n, p in task.model.named_parameters() if p.grad is None]
    assert not idle  # DistributedDataParallel waits for every gradient


def test_two_processes_train_as_one_does(zoo, tmp_path, qm7b):
    path = tiny.write_md17(tmp_path / "md17_chain.npz")
    options = [
        "fit",
        *SMALL,
        "--data.dataset",
        "md17",
        "--data.path",
        str(path),
        "--data.split",
        "0",
        "--data.options",
        "{train: 21, val: 7}",
        "--task.targets",
        "[energy]",
        "--task.forces",
        "true",
        "--task.lr",
        "0.001",
        "--trainer.max_epochs",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "attnpool_kernels.zoo", *options, "--output", "two"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("best by the validation loss") == 1  # one process speaks
    assert cli.main([*options, "--output", "one"]) == 0
    one, two = (rows(tmp_path / x / "logs/version_0/metrics.csv") for x in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and "val/mae/forces" in a
        for name, value in a.items():
            assert (value == "") == (b[name] == "")
            if value:
                assert float(value) == pytest.approx(float(b[name]), rel=1e-4), name
    one, two = (torch.load(tmp_path / x / "last.ckpt", weights_only=True) for x in ("one", "two"))
    for name, value in one["state_dict"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, two["state_dict"][name], rtol=2e-3, atol=2e-5)
