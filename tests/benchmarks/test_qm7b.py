"""The QM7b study on a few made-up molecules in the format of the real file."""

import csv

import pytest
import torch

from benchmarks.studies import qm7b

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("torch_geometric")


@pytest.fixture
def data(tmp_path):
    """40 molecules of 4 to 8 atoms on a jittered grid, with targets that depend on the atoms."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[range(2)] * 3), -1).reshape(-1, 3)
    counts = rng.integers(4, 9, 40)
    z = rng.choice([1, 6, 7, 8], counts.sum()).astype("int16")
    ptr = np.concatenate([[0], counts.cumsum()])
    pos = np.concatenate([grid[:n] * 2.5 + rng.normal(0, 0.1, (n, 3)) for n in counts])
    y = np.stack([np.bincount(np.repeat(np.arange(40), counts), z) * s for s in range(1, 15)], 1)
    path = tmp_path / "qm7b.npz"
    np.savez(path, z=z, pos=pos, ptr=ptr, y=y)
    return path


def rows(path):
    return list(csv.DictReader(line for line in open(path) if not line.startswith("#")))


def test_study(data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--data", str(data), "--epochs", "2", "--splits", "23887", "--poolings", "abp"]
    command += ["sum of atom outputs", "--out", str(out)]
    assert qm7b.main(command) == 0
    assert qm7b.main(command) == 0  # nothing is left to do, and nothing is written twice
    found = rows(out / "qm7b.csv")
    assert [(r["pooling"], r["target"]) for r in found] == [
        (p, t) for p in ("abp", "sum of atom outputs") for t in qm7b.TARGETS
    ]
    assert all(0 < float(r["test_mae"]) < 1e5 and float(r["constant_mae"]) > 0 for r in found)
    assert len(rows(out / "qm7b-curves.csv")) == 2 * 2 * 4
    assert (out / "qm7b.png").stat().st_size > 10_000
    assert "schnet, abp (1 splits)" in capsys.readouterr().out


def test_the_best_weights_are_tested(data):
    """Training goes on past the best epoch; the weights that come back are that epoch's."""
    from attnpool_kernels.zoo.datasets import load

    loaded = load("qm7b", data)
    columns = [loaded.target(name) for name in qm7b.TARGETS]
    molecules = loaded.molecules.to(dtype=torch.float32)
    torch.manual_seed(0)
    network = qm7b.model("schnet", "sum", 4)
    curve = []
    best, _ = qm7b.train(
        network,
        molecules,
        loaded.split(23887),
        columns,
        epochs=4,
        batch=8,
        lr=3e-2,
        seed=0,
        each=lambda epoch, mae, loss: curve.append(mae),
    )
    again = qm7b.errors(network, molecules, loaded.split(23887).val, columns)
    torch.testing.assert_close(again, curve[best])


def test_nothing_to_draw(tmp_path):
    with pytest.raises(SystemExit):
        qm7b.main(["--draw", "--out", str(tmp_path)])
