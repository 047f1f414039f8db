"""What a user reads: errors in one line, help, and what a run says of itself."""

import csv
import json
import subprocess

import pytest
import torch
from tools import tiny

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import predict, provenance, run, trainer
from attnpool_kernels.zoo.data import MoleculeData
from attnpool_kernels.zoo.task import PoolingTask
from attnpool_kernels.zoo.trainer import OptionError, TrainerOptions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'Parser key "data.split":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a\n"
            "  Given value type: <class 'str'>\n  Given value: x",
            "data.split must be int or null, got x",
        ),
        ("Parser key \"seed\": Expected a <class 'int'>. Got value: 1.5", "seed must be int"),
        (
            "Parser key \"task.targets\": Expected a <class 'collections.abc.Sequence'>. "
            "Got value: homo",
            "task.targets must be a list, got homo",
        ),
        ("no  type\nat all", "no type at all"),
    ],
)
def test_types_are_in_words(text, said):
    assert cli.plain_error(text).startswith(said)


def test_help_is_in_words():
    assert cli.plain_types("x (type: Optional[dict[str, Any]], default: null)") == "x (mapping)"
    assert cli.plain_types("(type: Optional[Sequence[int]], default: null)") == "(list of int)"
    assert cli.plain_types("(type: int | null, default: 3)") == "(int, default: 3)"


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a\nb"), AssertionError()])
def test_no_error_is_a_traceback(monkeypatch, capsys, error):
    def fails(argv):
        raise error

    monkeypatch.delenv("ATTNPOOL_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "_run", fails)
    assert cli.main(["fit"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: {type(error).__name__}: ")
    assert "ATTNPOOL_TRACEBACK=1" in err
    monkeypatch.setenv("ATTNPOOL_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["fit"])


def test_interrupted(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_thousands_of_processes_are_refused(monkeypatch):
    """Lightning would start them, all of which import torch."""
    monkeypatch.setattr(trainer.torch.accelerator, "is_available", lambda: False)
    with pytest.raises(OptionError, match="devices must be at most"):
        TrainerOptions("cpu", devices=3000).make()


@pytest.fixture
def folder(tmp_path):
    for epochs, path in ((1, None), (2, "last")):
        torch.manual_seed(0)
        task = PoolingTask("schnet", tiny.SCHNET, "sum", targets=["energy"])
        data = MoleculeData(tiny.molecule_set(), targets=["energy"], batch_size=8)
        options = TrainerOptions("cpu", max_epochs=epochs)
        run.fit(task, data, options, "config: 1", str(tmp_path / "run"), path)
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore:.*LeafSpec|Checkpoint directory")
def test_a_run_names_what_it_was_made_of(folder, capsys):
    starts = json.loads((folder / "versions.json").read_text())
    assert len(starts) == 2  # it was resumed
    for start in starts:
        assert start["packages"]["torch"] == torch.__version__
        assert start["packages"]["attnpool-kernels"] and start["python"]
        assert start["data"]["dataset"] == "tiny" and start["data"]["molecules"] == 40
    assert starts[0]["data"] == starts[1]["data"]
    data = MoleculeData(tiny.molecule_set(), targets=["energy"])
    data.setup()
    digest = provenance.data_digest(data)
    assert starts[0]["data"]["sha256"] == digest
    data.molecules.pos[3, 1] += 1e-12
    assert provenance.data_digest(data) != digest
    other = MoleculeData(tiny.molecule_set(train=27), targets=["energy"])
    other.setup()
    assert provenance.data_digest(other) != digest
    # Both kinds of logs, of both starts.
    for version in ("version_0", "version_1"):
        with open(folder / "logs" / version / "metrics.csv", newline="") as file:
            assert any(row["val/loss"] for row in csv.DictReader(file))
        assert list((folder / "logs" / version).glob("events.out.tfevents.*"))
    assert predict.load_task(folder).hparams["pooling"] == "sum"


def test_commit(tmp_path):
    package = tmp_path / "repository/attnpool_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert provenance.commit(package) is None  # no repository

    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *options, *arguments], cwd=package.parent, check=True)

    git("init", "-q")
    assert provenance.commit(package) is None  # not of that repository
    git("add", ".")
    git("commit", "-qm", "first")
    found = provenance.commit(package)
    assert len(found) == 40 and "-dirty" not in found
    (package / "__init__.py").write_text("x = 1\n")
    assert provenance.commit(package) == f"{found}-dirty"


def test_the_time_that_is_left(monkeypatch):
    class Trainer:
        current_epoch, max_epochs = 2, 10

    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    left = trainer.Remaining()
    assert left.text(Trainer, 3) == ""
    left.start(Trainer)
    now[0] += 30
    assert left.text(Trainer, 2) == "" and left.text(Trainer, 5) == "0:00:50"
    Trainer.max_epochs = -1
    assert left.text(Trainer, 5) == ""


def test_processes_of_torchrun(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert trainer.started_processes() == {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert trainer.started_processes() == {"devices": 4, "num_nodes": 2}
