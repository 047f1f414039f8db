"""Training that resumes: with which learning rate, schedule, patience, and until when."""

import math
import shutil
import warnings

import pytest
import torch
from tools import tiny
from torch.optim.lr_scheduler import CosineAnnealingLR

from attnpool_kernels.zoo import predict, run
from attnpool_kernels.zoo.data import MoleculeData
from attnpool_kernels.zoo.schedules import carry_over
from attnpool_kernels.zoo.task import PoolingTask
from attnpool_kernels.zoo.trainer import OptionError, TrainerOptions

LR = 1e-3


class Recorded(PoolingTask):
    """Notes the learning rate of every epoch; fails in one of them."""

    fails = None

    def on_train_epoch_start(self):
        self.rates = getattr(self, "rates", {})
        if self.current_epoch == self.fails:
            raise RuntimeError("as if the power had failed")
        self.rates[self.current_epoch] = self.trainer.optimizers[0].param_groups[0]["lr"]


def train(folder, epochs, ckpt_path=None, fails=None, patience=50, trainer=None, **options):
    """The learning rates by epoch."""
    torch.manual_seed(0)
    options = {"pooling": "sum", "pooling_options": {}, "lr": LR, **options}
    task = Recorded("schnet", tiny.SCHNET, targets=["energy"], **options)
    task.fails = fails
    data = MoleculeData(tiny.molecule_set(), targets=["energy"], batch_size=8, seed=1)
    given = TrainerOptions("cpu", max_epochs=epochs, options=trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec|Checkpoint directory|.*litlogger")
        run.fit(task, data, given, "", str(folder), ckpt_path, patience)
    return getattr(task, "rates", {})


def cosine(epoch, epochs, lr=LR, end=0.0):
    return end + (lr - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for epoch, rate in wanted.items():
        assert found[epoch] == pytest.approx(rate, rel=1e-9, abs=1e-15), epoch


def checkpoint(folder, name="last"):
    return torch.load(folder / f"{name}.ckpt", weights_only=True)


def rate_after(folder):
    return checkpoint(folder)["optimizer_states"][0]["param_groups"][0]["lr"]


@pytest.mark.parametrize("options", [{}, {"schedule_options": {"eta_min": 1e-4}}])
def test_a_cosine_ends_at_its_end_with_more_epochs(tmp_path, options):
    end = options.get("schedule_options", {}).get("eta_min", 0.0)
    options = {"schedule": "cosine", **options}
    found = train(tmp_path, 3, **options)
    close(found, {e: cosine(e, 3, end=end) for e in range(3)})
    assert rate_after(tmp_path) == pytest.approx(end, abs=1e-12)
    found = train(tmp_path, 6, "last", **options)
    close(found, {e: cosine(e, 6, end=end) for e in range(3, 6)})
    assert rate_after(tmp_path) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine"},
        {"schedule": "plateau", "schedule_options": {"patience": 0, "threshold": 0.5}},
        {},
    ],
)
def test_interrupted_is_the_same_as_whole(tmp_path, options):
    whole = train(tmp_path / "whole", 6, **options)
    with pytest.raises(RuntimeError, match="the power"):
        train(tmp_path / "parts", 6, fails=3, **options)
    rest = train(tmp_path / "parts", 6, "last", **options)
    assert rest == {e: x for e, x in whole.items() if e >= 3}
    a, b = (checkpoint(tmp_path / x) for x in ("whole", "parts"))
    assert a["lr_schedulers"] == b["lr_schedulers"]
    for name, value in a["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b["state_dict"][name]), name


OPTIONS = {None: {}, "plateau": {"patience": 0, "threshold": 0.9, "factor": 0.5}, "cosine": {}}


@pytest.mark.parametrize("lr", [LR, 4e-4])
@pytest.mark.parametrize("after", OPTIONS)
@pytest.mark.parametrize("before", OPTIONS)
def test_rate_and_schedule_given_on_resuming_act(tmp_path, capsys, before, after, lr):
    """A threshold of 0.9: no epoch is ever better, so the plateau halves after each but one."""
    train(tmp_path, 3, schedule=before, schedule_options=OPTIONS[before])
    capsys.readouterr()
    found = train(tmp_path, 6, "last", schedule=after, schedule_options=OPTIONS[after], lr=lr)
    changed = before != after or lr != LR
    if after == "cosine":
        wanted = [cosine(e, 6, lr) for e in (3, 4, 5)]
    elif after == "plateau":
        first = lr if changed else LR / 4  # of a plateau the first loss is the best
        better = before != "plateau"
        wanted = [first, first if better else first / 2, first / 2 if better else first / 4]
    else:
        wanted = [lr] * 3
    close(found, dict(zip((3, 4, 5), wanted)))
    there = checkpoint(tmp_path)["hyper_parameters"]
    assert (there["lr"], there["schedule"]) == (lr, after)  # what was used
    out = capsys.readouterr().out
    assert (f"had task.lr {LR}; from here on it is {lr}" in out) == (lr != LR)
    assert ("had task.schedule " in out) == (before != after)


def test_options_of_the_schedule_given_on_resuming_act(tmp_path):
    options = {"patience": 0, "threshold": 0.9, "factor": 0.5}
    train(tmp_path, 3, schedule="plateau", schedule_options=options)
    options |= {"factor": 0.1, "patience": 1, "min_lr": 1e-7}
    found = train(tmp_path, 7, "last", schedule="plateau", schedule_options=options)
    close(found, {3: LR / 4, 4: LR / 4, 5: LR / 40, 6: LR / 40})


def test_state_of_torchs_cosine_in_older_checkpoints(tmp_path):
    train(tmp_path, 3)
    found = checkpoint(tmp_path)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=LR)
    old = CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        optimizer.step()
        old.step()
    found["lr_schedulers"] = [old.state_dict()]
    found["hyper_parameters"]["schedule"] = "cosine"
    found["optimizer_states"][0]["param_groups"][0]["lr"] = 0.0
    torch.save(found, tmp_path / "last.ckpt")
    close(train(tmp_path, 5, "last", schedule="cosine"), {e: cosine(e, 5) for e in (3, 4)})


def test_a_checkpoint_without_optimizers_is_left_alone():
    given = {"hyper_parameters": {"lr": 1.0}, "state_dict": {}}
    carry_over(given, 0.1, "cosine")
    assert given == {"hyper_parameters": {"lr": 1.0}, "state_dict": {}}


def never_better(folder, epochs, *rest, **options):
    """A rate of 1e-30 changes no weight: only the first epoch is better."""
    return train(folder, epochs, *rest, lr=1e-30, **options)


def test_patience_given_on_resuming_acts_and_a_finished_run_says_so(tmp_path, capsys):
    assert set(never_better(tmp_path, -1, patience=2)) == {0, 1, 2}
    before = (tmp_path / "last.ckpt").read_bytes()
    capsys.readouterr()
    assert never_better(tmp_path, -1, "last", patience=2) == {}
    out = capsys.readouterr().out
    assert "nothing left to do" in out and "2 epochs without a better validation loss" in out
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not (tmp_path / "logs/version_1").exists()
    assert set(never_better(tmp_path, -1, "last", patience=4)) == {3, 4}
    # Another rate has the whole patience.
    assert set(train(tmp_path, -1, "last", lr=2e-30, patience=2)) == {5, 6}


@pytest.mark.parametrize("epochs", [3, 2])
def test_no_epochs_left(tmp_path, capsys, epochs):
    train(tmp_path, 3)
    capsys.readouterr()
    assert train(tmp_path, epochs, "last") == {}
    out = capsys.readouterr().out
    assert out == (
        f"nothing left to do for {tmp_path / 'last.ckpt'}: 3 epochs are done, trainer.max_epochs "
        f"is {epochs}\n"
    )
    assert train(tmp_path, 4, "last").keys() == {3}


def test_no_steps_left(tmp_path, capsys):
    train(tmp_path, -1, trainer={"max_steps": 8})
    capsys.readouterr()
    assert train(tmp_path, -1, "last", trainer={"max_steps": 8}) == {}
    assert "8 steps are done, max_steps is 8" in capsys.readouterr().out


def test_the_best_model_of_a_moved_run_stays(tmp_path):
    never_better(tmp_path / "a", 2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The dirpath has changed")
        never_better(tmp_path / "b", 3, "last")
    assert checkpoint(tmp_path / "b", "best")["epoch"] == 0
    assert not (tmp_path / "a").exists()


def test_another_run_goes_on_in_a_folder_of_its_own(tmp_path):
    train(tmp_path / "a", 2)
    train(tmp_path / "b", 2)
    before = (tmp_path / "b/last.ckpt").read_bytes()
    for path in ("last.ckpt", ""):
        with pytest.raises(ValueError, match="output must be a new folder"):
            train(tmp_path / "b", 4, str(tmp_path / "a" / path))
    assert (tmp_path / "b/last.ckpt").read_bytes() == before
    assert train(tmp_path / "c", 4, str(tmp_path / "a/last.ckpt")).keys() == {2, 3}
    assert train(tmp_path / "a", 3, str(tmp_path / "a/last.ckpt")).keys() == {2}
    best = checkpoint(tmp_path / "a", "best")["epoch"]
    assert min(train(tmp_path / "a", 4, str(tmp_path / "a"))) == best + 1  # as `test` takes it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "mse"}, "of another loss: loss is 'l1' there and 'mse' here"),
        ({"coefficient_factor": 0.5}, "of another loss: coefficient_factor is 0.1 there"),
    ],
)
def test_losses_before_and_after_must_compare(tmp_path, options, said):
    train(tmp_path, 1)
    with pytest.raises(ValueError, match=said):
        train(tmp_path, 2, "last", **options)


def test_plateau_counts_epochs_with_validation(tmp_path):
    options = {"patience": 0, "threshold": 0.9, "factor": 0.5}
    given = {"check_val_every_n_epoch": 2}
    found = train(tmp_path, 7, schedule="plateau", schedule_options=options, trainer=given)
    close(found, dict(enumerate([LR] * 4 + [LR / 2] * 2 + [LR / 4])))
    # Validation after 2, 4 and 6 epochs; the last epoch leaves the best as it is.
    assert checkpoint(tmp_path, "best")["epoch"] in (1, 3, 5)
    assert predict.load_task(tmp_path).hparams["schedule"] == "plateau"
    assert never_better(tmp_path / "b", 20, trainer=given, patience=2).keys() == set(range(6))


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"limit_val_batches": 0}, "limit_val_batches must not be 0"),
        ({"limit_val_batches": 0.0}, "limit_val_batches must not be 0"),
        ({"limit_train_batches": 0}, "limit_train_batches must not be 0"),
        ({"check_val_every_n_epoch": 3}, "check_val_every_n_epoch must be at most max_epochs, 2"),
    ],
)
@pytest.mark.parametrize("schedule", [None, "plateau"])
def test_a_run_must_validate(tmp_path, schedule, trainer, said):
    with pytest.raises(OptionError, match=said):
        train(tmp_path / "a", 2, schedule=schedule, trainer=trainer)
    assert not (tmp_path / "a").exists()


def test_plateau_without_validation_under_a_trainer_of_ones_own():
    from .test_task import run as trained
    from .test_task import task

    data = MoleculeData(tiny.molecule_set(), targets=["energy"])
    with pytest.raises(ValueError, match="limit_val_batches must not be 0 with schedule='plateau'"):
        trained(task(schedule="plateau"), data, 2, limit_val_batches=0)
    trained(task(), data, 2, limit_val_batches=0)
    made = task(schedule="plateau")
    trainer = trained(made, data, 2, check_val_every_n_epoch=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == LR
    trained(made, data, 2, num_sanity_val_steps=2, check_val_every_n_epoch=5)


@pytest.mark.parametrize("schedule", [None, "plateau", "cosine"])
def test_a_trial_says_that_it_keeps_nothing(tmp_path, capsys, schedule):
    train(tmp_path / "a", 5, schedule=schedule, trainer={"fast_dev_run": True})
    assert "fast_dev_run: tried 1 of the batches" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("limit", ["max_time", "max_steps"])
def test_a_training_without_a_validation_says_so(tmp_path, limit):
    given = {"max_time": "00:00:00:00"} if limit == "max_time" else {"max_steps": 1}
    with pytest.raises(ValueError, match=r"stopped after . steps, before the first vali"):
        train(tmp_path, 5, trainer=given)
