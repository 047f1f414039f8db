"""Trainings that die, disks that are full, folders that others use: nothing is lost or wrong."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings

import pytest
import torch
from tools import killed, tiny

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import checkpoints, predict

from .test_cli import SMALL
from .test_resume import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(folder, 3)
    return folder


def test_killed_at_random_moments_is_the_same_as_whole():
    found = subprocess.run(
        [sys.executable, "-m", "tools.killed", "--moments", "2", "--writes", "2", "--epochs", "8"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("the same") >= 3


def test_killed_between_the_best_and_the_last_checkpoint(tmp_path, finished):
    """Of the first epoch: the best is there and the last is not."""
    train(tmp_path / "a", 1)
    (tmp_path / "a/last.ckpt").unlink()
    with pytest.raises(ValueError, match="--ckpt_path last"):
        train(tmp_path / "a", 3)
    assert train(tmp_path / "a", 3, "last").keys() == {1, 2}
    assert killed.difference(finished, tmp_path / "a") == ""


def test_dropout_goes_on_where_it_was(tmp_path):
    options = {"pooling": "abp", "pooling_options": {**killed.tiny.ABP, "dropout": 0.3}}
    train(tmp_path / "whole", 4, **options)
    train(tmp_path / "parts", 2, **options)
    train(tmp_path / "parts", 4, "last", **options)
    assert killed.difference(tmp_path / "whole", tmp_path / "parts") == ""


def test_a_checkpoint_is_written_in_its_own_folder(tmp_path, monkeypatch):
    """The temporary folder of the system may be full, and a move from there may be a copy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    train(tmp_path / "a", 1)
    assert predict.read_checkpoint(tmp_path / "a/last.ckpt")["epoch"] == 0


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_the_old_checkpoint_stays_where_the_new_one_cannot_be_written(
    tmp_path, monkeypatch, finished, fails
):
    path = tmp_path / "last.ckpt"
    shutil.copy(finished / "last.ckpt", path)
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = "os.replace" if fails == "rename" else "pathlib.Path.write_bytes"
    monkeypatch.setattr(name, full)
    with pytest.raises(OSError, match=r"last\.ckpt was not written: No space left on device"):
        checkpoints.WholeCheckpoints().save_checkpoint({"a": torch.zeros(9)}, str(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.ckpt"]


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process may become larger, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def zoo(tmp_path, capsys, monkeypatch):
    """Runs a command line: exit code, and errors without warnings."""
    monkeypatch.setattr(cli, "quiet", lambda: None)
    data = tiny.write_qm7b(tmp_path / "qm7b_small.npz")

    def go(*argv):
        if argv[0] == "fit":
            argv = (argv[0], *SMALL, "--data.path", str(data), *argv[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main([str(a) for a in argv])
        return code, capsys.readouterr().err

    return go


def one_line(err, *words):
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "ATTNPOOL_TRACEBACK" not in err, err
    assert all(word in err for word in words), err


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(zoo, tmp_path):
    run = ("--output", tmp_path / "a")
    assert zoo("fit", *run, "--trainer.max_epochs", 2)[0] == 0
    size = (tmp_path / "a/last.ckpt").stat().st_size
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.ckpt")}
    resume = (*run, "--trainer.max_epochs", 4, "--ckpt_path", "last")
    for share in (0.1, 0.6):
        with files_up_to(int(share * size)):
            code, err = zoo("fit", *resume)
        assert code == 1
        one_line(err, "ckpt was not written: File too large")
        assert {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.ckpt")} == before
        assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]
    assert zoo("fit", *resume)[0] == 0
    assert zoo("fit", "--output", tmp_path / "b", "--trainer.max_epochs", 4)[0] == 0
    assert killed.difference(tmp_path / "b", tmp_path / "a") == ""


def test_a_full_disk_under_a_table(zoo, tmp_path, finished):
    lines = "2\n\nO 0 0 0\nH 0 0 1\n"
    (tmp_path / "m.xyz").write_text(lines * 400)
    command = ("predict", tmp_path / "m.xyz", finished, "--part_size", 100)
    assert zoo(*command, "--output", tmp_path / "whole.csv")[0] == 0
    size = (tmp_path / "whole.csv").stat().st_size
    with files_up_to(size // 2):  # a part fits, the table does not
        code, err = zoo(*command, "--output", tmp_path / "m.csv")
    assert code == 1 and not (tmp_path / "m.csv").exists()
    one_line(err, "File too large")
    assert zoo(*command, "--output", tmp_path / "m.csv")[0] == 0  # goes on
    assert (tmp_path / "m.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    code, err = zoo(*command, "--output", "/dev/full/m.csv")
    assert code == 1
    one_line(err, "output must be in a folder that exists")


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """A folder in which nothing can be made or written, by root neither."""
    folder = tmp_path_factory.mktemp("fixed")
    inside = str(folder)

    def refuse(event, arguments):
        if not active or not arguments or not str(arguments[0]).startswith(inside):
            return
        writes = event in ("os.mkdir", "os.rename", "os.remove")
        if event == "open":
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    active = [True]
    sys.addaudithook(refuse)
    yield folder
    active.clear()


def test_read_only_folders(zoo, tmp_path, read_only, finished):
    for output in (read_only, read_only / "a/b"):
        code, err = zoo("fit", "--output", output, "--trainer.max_epochs", 1)
        assert code == 1
        one_line(err, "Read-only file system", str(read_only))
    (tmp_path / "m.xyz").write_text("2\n\nO 0 0 0\nH 0 0 1\n")
    code, err = zoo("predict", tmp_path / "m.xyz", finished, "--output", read_only / "m.csv")
    assert code == 1
    one_line(err, "Read-only file system", "m.csv")


def test_two_runs_into_one_folder(tmp_path):
    """The second is refused while the first trains, and takes nothing of it away."""
    folder, inside, go = tmp_path / "a", threading.Event(), threading.Event()
    folder.mkdir()
    (folder / ".last.ckpt.0.part").write_text("of a run that was killed")

    def first():
        with checkpoints.alone_in(folder):
            (folder / ".last.ckpt.1.part").write_text("half")
            inside.set()
            go.wait(60)

    worker = threading.Thread(target=first)
    worker.start()
    try:
        assert inside.wait(60)
        for path in (None, "last"):
            with pytest.raises(ValueError, match="must not be in use by another run"):
                train(folder, 1, path)
        assert [p.name for p in folder.glob("*.part")] == [".last.ckpt.1.part"]
    finally:
        go.set()
        worker.join()
    assert train(folder, 1).keys() == {0}
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_two_predictions_into_one_table(zoo, tmp_path, finished):
    (tmp_path / "m.xyz").write_text("2\n\nO 0 0 0\nH 0 0 1\n")
    command = ("predict", tmp_path / "m.xyz", finished, "--output", tmp_path / "m.csv")
    with checkpoints.alone_in(tmp_path / "m.csv.parts"):
        code, err = zoo(*command)
    assert code == 1 and not (tmp_path / "m.csv").exists()
    one_line(err, "must not be in use by another run", "m.csv.parts")
    assert zoo(*command)[0] == 0 and not (tmp_path / "m.csv.parts").exists()


def test_a_folder_of_a_killed_process_is_free(tmp_path):
    pid = os.fork()
    if not pid:
        with checkpoints.alone_in(tmp_path / "a"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert killed.ended(pid) == -signal.SIGKILL
    assert (tmp_path / "a" / checkpoints.LOCK).exists()
    with checkpoints.alone_in(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()  # nothing came into it


def test_a_checkpoint_cut_at_every_kilobyte(zoo, tmp_path, finished):
    whole = (finished / "best.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    sizes = [*range(0, len(whole), 1024), len(whole) - 1]
    for size in sizes:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.ckpt is damaged or no checkpoint: [^\n]*$"):
            predict.load_task(cut)
    (tmp_path / "m.xyz").write_text("2\n\nO 0 0 0\nH 0 0 1\n")
    for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
        cut.write_bytes(whole[:size])
        for command in (
            ("predict", tmp_path / "m.xyz", cut),
            ("test", "--ckpt_path", cut),
            ("fit", "--output", tmp_path / "b", "--ckpt_path", cut),
        ):
            code, err = zoo(*command)
            assert code == 1
            one_line(err, "cut.ckpt is damaged or no checkpoint")


def test_a_wrong_byte_in_every_kilobyte(tmp_path, finished):
    """torch.load takes other numbers for weights; here the checksums of the archive are read."""
    whole = (finished / "best.ckpt").read_bytes()
    weights = {k: x for k, x in predict.load_task(finished).state_dict().items()}
    path, refused = tmp_path / "wrong.ckpt", 0
    for place in range(100, len(whole), 1024):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = predict.load_task(path).state_dict()
        except ValueError:
            refused += 1
        else:  # padding between two members, which nobody reads
            assert all(torch.equal(x, found[k]) for k, x in weights.items() if hasattr(x, "shape"))
    assert refused > 0.5 * len(whole) / 1024
