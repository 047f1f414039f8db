"""Files of others run no code and write nowhere but where they are told to: see SECURITY.md."""

import io
import os
import pickle
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from tools import tiny

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import predict
from attnpool_kernels.zoo.calculator import PooledCalculator
from attnpool_kernels.zoo.datasets import files, load
from attnpool_kernels.zoo.datasets.files import Download
from attnpool_kernels.zoo.molecule_files import read_molecules

from .test_cli import SMALL
from .test_resume import train


class Command:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code has run"


@pytest.fixture
def zoo(capsys):
    """Runs a command line: exit code and the one line of its error."""

    def go(*argv):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main([str(a) for a in argv])
        err = capsys.readouterr().err
        assert "Traceback" not in err and (code == 0 or err.count("\n") == 1), err
        return code, err

    return go


def test_the_pickle_of_these_tests_runs_code(marker):
    pickle.loads(pickle.dumps(Command(marker)))
    assert marker.exists()


def checkpoints(folder, marker):
    """Files that somebody may call a checkpoint."""
    evil = Command(marker)
    parts = {"zoo": {}, "hyper_parameters": {}, "state_dict": {}}
    for name, content in (("alone", evil), ("inside", parts | {"callbacks": {"x": evil}})):
        torch.save(content, folder / f"{name}.ckpt")
        torch.save(content, folder / f"{name}-old.ckpt", _use_new_zipfile_serialization=False)
        (folder / f"{name}-bare.ckpt").write_bytes(pickle.dumps(content))
    model = torch.nn.Linear(2, 2)
    model.evil = evil
    torch.save(model, folder / "model.ckpt")
    return sorted(folder.glob("*.ckpt"))


def test_checkpoints(tmp_path, marker, zoo):
    (tmp_path / "m.xyz").write_text("2\n\nO 0 0 0\nH 0 0 1\n")
    data = tiny.write_qm7b(tmp_path / "qm7b_small.npz")
    found = checkpoints(tmp_path, marker)
    assert len(found) == 7
    for path in found:
        for read in (predict.read_checkpoint, predict.load_task, PooledCalculator):
            with pytest.raises(ValueError, match=r"is damaged or no checkpoint|of another program"):
                read(path)
        for command in (
            ("predict", tmp_path / "m.xyz", path),
            ("test", "--ckpt_path", path),
            ("fit", *SMALL, "--data.path", data, "--output", tmp_path / "b", "--ckpt_path", path),
        ):
            assert zoo(*command)[0] == 1
    assert not marker.exists()


def test_lightning_reads_a_checkpoint_of_a_run_without_pickles(tmp_path, marker):
    """What our own check lets pass meets ``weights_only`` again where Lightning loads it."""
    train(tmp_path / "a", 1)
    path = tmp_path / "a/last.ckpt"
    good = torch.load(path, weights_only=True)
    torch.save(good | {"loops": Command(marker)}, path)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        train(tmp_path / "a", 2, "last")
    assert not marker.exists()


def test_a_checkpoint_cannot_ask_for_pickled_data(tmp_path, marker, zoo):
    """``test`` loads the data that the checkpoint names, but not as pickles without a word."""
    train(tmp_path / "a", 1)
    path, data = tmp_path / "a/best.ckpt", tmp_path / "qm8.pt"
    torch.save([Command(marker)], data)
    good = torch.load(path, weights_only=True)
    for options in ({"weights_only": False}, {"weights_only": 0}, {"allow_pickle": True}):
        described = {"dataset": "qm8", "path": str(data), "options": options}
        torch.save(good | {"zoo": good["zoo"] | {"data": good["zoo"]["data"] | described}}, path)
        code, err = zoo("test", "--ckpt_path", path)
        assert code == 2 and "can run code" in err and "--trust_data" in err
        assert not marker.exists()
    described = {"dataset": "qm8", "path": str(data), "options": {}}
    torch.save(good | {"zoo": good["zoo"] | {"data": good["zoo"]["data"] | described}}, path)
    assert zoo("test", "--ckpt_path", path)[0] == 1
    assert not marker.exists()


def test_configurations(tmp_path, marker, zoo):
    """YAML makes plain values only, and no option takes the name of a class."""
    data = tiny.write_qm7b(tmp_path / "qm7b_small.npz")
    call = {"class_path": "os.mkdir", "init_args": {"path": str(marker)}}
    texts = [
        f'task:\n  backbone: !!python/object/apply:os.mkdir ["{marker}"]\n',
        f'trainer: !!python/object/apply:os.mkdir ["{marker}"]\n',
        f'task: !!python/object/new:os.mkdir ["{marker}"]\n',
        "task:\n  backbone: !!python/name:os.mkdir\n",
        *(f"{key}: {call}\n" for key in ("task", "data", "trainer")),
        *(f"trainer:\n  options:\n    {x}: [{call}]\n" for x in ("callbacks", "plugins")),
        *(f"trainer:\n  options:\n    {x}: {call}\n" for x in ("logger", "profiler")),
        f"trainer:\n  strategy: {call}\n",
        *(f"task:\n  {x}_options:\n    activation: {call}\n" for x in ("backbone", "pooling")),
        f"data:\n  options:\n    read: {call}\n",
    ]
    for text in texts:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        folder = tmp_path / "run"
        code, _ = zoo("fit", *SMALL, "--config", path, "--data.path", data, "--output", folder)
        assert code in (1, 2) and not marker.exists(), text


@pytest.mark.parametrize("suffix", ["py", "traj", "pckl", "pickle", "json", "db", "xyz", "npz"])
def test_files_of_molecules(tmp_path, marker, suffix):
    """Whatever ASE reads a file as, nothing of it is run."""
    path = tmp_path / f"m.{suffix}"
    source = f"import os\nos.mkdir({str(marker)!r})\n"
    header = b"PickleTrajectory"
    evil = pickle.dumps(Command(marker), protocol=2)
    for content in (source.encode(), evil, header + evil, b"S*" + header + evil):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_molecules(path)
    assert not marker.exists()


def test_data_sets(tmp_path, marker):
    evil = np.array([Command(marker)] * 3, dtype=object)
    path = tmp_path / "qm7b.npz"
    np.savez(path, z=evil, pos=evil, ptr=evil, y=evil)
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        load("qm7b", path, sha256=files.digest(path))
    np.save(tmp_path / "md17_x.npz", evil)  # .npz.npy
    os.replace(tmp_path / "md17_x.npz.npy", tmp_path / "md17_x.npz")
    with pytest.raises(ValueError):
        load("md17", tmp_path / "md17_x.npz")
    for name in ("qm8", "qm9", "qmugs"):
        path = tmp_path / f"{name}.pt"
        torch.save([Command(marker)], path)
        with pytest.raises((ValueError, FileNotFoundError)):
            load(name, path)
    assert not marker.exists()


def test_a_cache_is_no_pickle(tmp_path, marker):
    """One that lies beside a file is remade where it holds objects."""
    path = tiny.write_qm7b(tmp_path / "data.npz")
    stat = path.stat()
    key = np.array([stat.st_size, stat.st_mtime_ns, 1], dtype=np.int64)
    np.savez(f"{path}.cache.npz", key=key, z=np.array([Command(marker)], dtype=object))
    folder = files.Folder("x", "", path)
    found = folder.cached(path, 1, lambda: {"z": np.ones(1)})
    assert found["z"].tolist() == [1.0] and not marker.exists()


MEMBERS = ("../../up.txt", "/tmp/attnpool-absolute.txt", "a/../../wanted.xyz", "b/../other.txt")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_write_only_what_is_wanted(tmp_path, kind):
    """Under its own name in the folder, whatever paths the archive has; links are not followed."""
    archive, folder = tmp_path / f"in.{kind}", tmp_path / "deep/er/data"
    folder.mkdir(parents=True)
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as made:
            for name in MEMBERS:
                made.writestr(name, "x")
    else:
        with tarfile.open(archive, "w:gz") as made:
            for name in MEMBERS:
                member = tarfile.TarInfo(name)
                member.size = 1
                made.addfile(member, io.BytesIO(b"x"))
            link = tarfile.TarInfo("c/wanted2.xyz")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            made.addfile(link)
    before = {p for p in tmp_path.rglob("*")}
    files.fetch(Download(archive.as_uri(), ("wanted.xyz",)), folder)
    made = {p for p in tmp_path.rglob("*")} - before
    assert made == {folder / "wanted.xyz"} and (folder / "wanted.xyz").read_text() == "x"
    assert not os.path.exists(MEMBERS[1])
    with pytest.raises(ValueError, match=r"does not hold wanted2\.xyz"):
        files.fetch(Download(archive.as_uri(), ("wanted2.xyz",)), folder)


def test_a_wrong_digest_is_refused_before_the_file_is_read(tmp_path, marker):
    path = tmp_path / "qm8.pt"
    torch.save([Command(marker)], path)
    with pytest.raises(ValueError, match=r"sha256 of .* must be 0000"):
        load("qm8", path, sha256="0" * 64, weights_only=False)
    assert not marker.exists()
