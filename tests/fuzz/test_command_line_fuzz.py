"""``python -m attnpool_kernels.zoo`` with damaged files: one line of our own, never a traceback.

Exit codes as documented: 0, 2 for an option, 1 for a file. An error whose line names its class is
one that nobody has thought of.
"""

import contextlib
import csv
import functools
import io
import re
import shutil
import warnings

import pytest
import torch
from hypothesis import strategies as st
from tools.drawn import drawn

pytest.importorskip("torch_geometric")
pytest.importorskip("jsonargparse")

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import run
from fuzz import files
from fuzz.mutations import binary_damages, damaged, damages

CONFIG = """# a comment
seed_everything: null
task:
  backbone: schnet
  backbone_options: {hidden_channels: 16, num_filters: 16, num_interactions: 1}
  pooling: abp
  pooling_options:
    hidden: 16
    heads: 2
    seeds: 2
  targets: [homo_gw]
  lr: 0.001
data:
  dataset: qm7b
  path: PATH
  batch_size: 8
trainer:
  accelerator: cpu
  max_epochs: 1
  options: {limit_train_batches: 2, limit_val_batches: 1}
patience: 3
""".replace("seed_everything: null\n", "seed: 1\n")


def called(*argv):
    """Exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("ignore")
        try:
            code = cli.main([str(x) for x in argv])
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def judged(code, out, err, codes=(0, 1, 2)):
    assert code in codes, (code, err)
    assert "Traceback" not in out + err
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    if code == 0:
        assert not said
        return True
    assert len(said) == 1 and err.endswith(said[0] + "\n"), err
    assert "ATTNPOOL_TRACEBACK=1 shows where" not in said[0], said[0]
    return False


@functools.cache
def checkpoint() -> bytes:
    """Of a tiny model of H, C, N and O, trained for two steps."""
    place = files.folder() / "run"
    (files.folder() / "config.yaml").write_text(configuration())
    code, _, err = called("fit", "--config", files.folder() / "config.yaml", "--output", place)
    assert code == 0, err
    found = torch.load(place / "best.ckpt", weights_only=True)
    found["zoo"]["elements"] = [1, 6, 7, 8]
    return files.pt(found)


def configuration() -> str:
    files.qm7b_arrays()  # writes the file
    return CONFIG.replace("PATH", str(files.folder() / "qm7b_small.npz"))


def predicted(source, weights):
    """Exit code and printed table of predictions for a file."""
    place = files.folder() / "weights.ckpt"
    place.write_bytes(weights)
    return called("predict", source, place)


@drawn(10, steps=damages, name=st.sampled_from(["m.xyz", "m.extxyz", "m.sdf", "m.txt", "m"]))
def test_predict_for_damaged_molecules(steps, name):
    """The table has a row for every molecule that the file says."""
    kind = "sdf" if name == "m.sdf" else "extxyz" if name == "m.extxyz" else "xyz"
    data = damaged(files.sdf_file() if kind == "sdf" else files.xyz_file(kind), steps)
    path = files.folder() / name
    path.write_bytes(data)
    code, out, err = predicted(path, checkpoint())
    if not judged(code, out, err):
        return
    rows = list(csv.DictReader(out.splitlines()))
    assert f", {len(rows)} molecules" in err
    if name in ("m.xyz", "m.extxyz", "m.sdf"):
        said = files.said_by_sdf(data) if kind == "sdf" else files.said_by_xyz(data)
        assert said is not None and len(rows) == len(said)
        sizes = [len(x if kind == "sdf" else x[1]) for x in said]
        assert [int(row["atoms"]) for row in rows] == sizes


@functools.cache
def undamaged() -> str:
    path = files.folder() / "whole.xyz"
    path.write_bytes(files.xyz_file("xyz"))
    code, out, err = predicted(path, checkpoint())
    assert judged(code, out, err)
    return out


@drawn(10, steps=binary_damages)
def test_damaged_checkpoints(steps):
    """A damaged checkpoint predicts what the whole one does, or nothing."""
    wanted = undamaged()
    code, out, err = predicted(files.folder() / "whole.xyz", damaged(checkpoint(), steps))
    if judged(code, out, err):
        assert out == wanted


VALUES = [
    None,
    -1,
    0,
    2**70,
    1.5,
    "x",
    b"x",
    [],
    {},
    [1],
    {"a": 1},
    True,
    float("nan"),
    torch.zeros(0),
    torch.zeros(3),
    torch.zeros(2, 2, dtype=torch.complex64),
    torch.zeros(3, device="meta"),
    torch.zeros(2, 2).to_sparse(),
    (),
    "homo_gw",
    ["homo_gw", "homo_gw"],
]


def places(value, path=()):
    """Paths to everything in nested dictionaries and lists."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from places(item, (*path, number))


def with_value(value, path, new):
    if not path:
        return new
    if isinstance(value, dict):
        out = dict(value)
        if new is places and len(path) == 1:  # the mark of what is to go
            del out[path[0]]
        else:
            out[path[0]] = with_value(value[path[0]], path[1:], new)
        return out
    out = list(value)
    out[path[0]] = None if new is places else with_value(out[path[0]], path[1:], new)
    return type(value)(out)


@drawn(
    15,
    where=st.integers(0, 10**6),
    value=st.integers(0, len(VALUES)),
    name=st.sampled_from(["zoo", "hyper_parameters", "state_dict", ""]),
    test=st.booleans(),
)
def test_checkpoints_with_other_contents(where, value, name, test):
    found = torch.load(io.BytesIO(checkpoint()), weights_only=True)
    inside = found[name] if name else found
    paths = [path for path in places(inside) if "callbacks" not in path[:1]]
    path = paths[where % len(paths)]
    new = places if value == len(VALUES) else VALUES[value]
    changed = with_value(inside, path, new) if path or new is not places else {}
    made = {**found, name: changed} if name else changed
    undamaged()  # writes the molecules
    place = files.folder() / "weights.ckpt"
    place.write_bytes(files.pt(made))
    if test:
        code, out, err = called("test", "--ckpt_path", place, "--output", files.folder() / "t.csv")
    else:
        code, out, err = called("predict", files.folder() / "whole.xyz", place)
    judged(code, out, err)


@contextlib.contextmanager
def without_training():
    """The command line up to the start of a training."""
    real = run.fit

    @functools.wraps(real)
    def fit(*arguments, **options):
        return None

    run.fit = fit
    try:
        yield
    finally:
        run.fit = real


@drawn(8, steps=damages)
def test_damaged_configurations(steps):
    data = damaged(configuration().encode(), steps)
    numbers = re.findall(rb"\d{5,}", data.replace(str(files.folder()).encode(), b""))
    if any(len(x) < 10 for x in numbers):
        return  # a model of that size takes all memory
    path = files.folder() / "damaged.yaml"
    path.write_bytes(data)
    with without_training():
        judged(*called("fit", "--config", path, "--output", files.folder() / "none"))
    assert not (files.folder() / "none").exists()


@drawn(2, steps=damages)
def test_training_with_damaged_configurations(steps):
    """The same with the training, of two steps where a damaged line allows it."""
    data = damaged(configuration().encode(), steps)
    short = re.search(rb"max_epochs: 1\b", data) and re.search(rb"limit_train_batches: 2\b", data)
    if not short or re.search(rb"\d{4}", data.replace(str(files.folder()).encode(), b"")):
        return
    path = files.folder() / "damaged.yaml"
    path.write_bytes(data)
    judged(*called("fit", "--config", path, "--output", files.folder() / "trained"))
    shutil.rmtree(files.folder() / "trained", ignore_errors=True)
