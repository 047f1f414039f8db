"""The study of poolings at equal parameters: runs that resume, and what is called significant."""

import math

import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("scipy")

from tools import tiny

from benchmarks.studies import fair
from benchmarks.studies.qm7b import Table

SMALL = ["--width", "16", "--interactions", "1", "--splits", "7", "--epochs", "2", "--batch", "8"]


def options(tmp_path, *more):
    return fair.parser().parse_args([*SMALL, "--out", str(tmp_path), *more])


def rows(tmp_path):
    return Table(tmp_path / "fair.csv", ()).read()


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    data = tiny.molecule_set()
    chosen = ["--poolings", "abp", "softmax", "sum of atom outputs", "--seeds", "0", "1"]
    fair.study(options(tmp_path, *chosen, "--minutes", "0"), data)
    assert "out of time" in capsys.readouterr().err and not (tmp_path / "fair.csv").exists()
    right, calls = fair.train, []

    def interrupted(*given, **named):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*given, **named)

    monkeypatch.setattr(fair, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fair.study(options(tmp_path, *chosen), data)
    first = rows(tmp_path)
    assert len(first) == 3
    fair.study(options(tmp_path, *chosen), data)
    found = rows(tmp_path)
    assert found[:3] == first and len(calls) == 4 + 7
    fair.study(options(tmp_path, *chosen), data)
    assert rows(tmp_path) == found and len(calls) == 11
    runs = {(r["seed"], r["pooling"], r["size"]) for r in found}
    others = [(s, p, size) for s in "01" for p in chosen[2:4] for size in fair.SIZES]
    assert len(found) == len(runs) == 10
    assert runs == {("0", "abp", "own"), ("1", "abp", "own"), *others}
    assert all(0 < float(r["mae homo, eV"]) < 100 and int(r["test"]) == 6 for r in found)
    fair.study(options(tmp_path, *chosen, "--lr", "0.01", "--minutes", "9"), data)
    assert len(rows(tmp_path)) == 20 and len(fair.last_setting(rows(tmp_path))) == 10
    assert fair.main([*SMALL, "--out", str(tmp_path), "--table"]) == 0
    told = capsys.readouterr().out
    assert "lr 0.01" in told and told.count("| homo, eV |") == 2
    assert fair.main(["--out", str(tmp_path / "none"), "--table"]) == 2


@pytest.mark.parametrize("pooling", [p for p in fair.POOLINGS if p != "abp"])
def test_equal_parameters(pooling):
    wanted = fair.parameters(fair.build("abp", 32, 2, 14))
    width = fair.equal_width(pooling, 32, 2, 14)
    assert (
        width > 32 and abs(fair.parameters(fair.build(pooling, width, 2, 14)) / wanted - 1) < 0.04
    )


def test_the_sizes_of_the_study():
    """525 thousand parameters against 243 at the width of the published table."""
    assert round(fair.parameters(fair.build("abp", 128, 3, 4)), -3) == 525_000
    assert round(fair.parameters(fair.build("sum", 128, 3, 4)), -3) == 243_000


def test_training_stops_and_keeps_the_best(monkeypatch):
    data = tiny.molecule_set()
    molecules = data.molecules.to(dtype=torch.float32)
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0, 0.1])
    network, states = fair.build("sum", 16, 1, 2), []

    def errors(model, *_):
        states.append({k: x.clone() for k, x in model.state_dict().items() if "extra" not in k})
        return torch.full((2,), next(scores), dtype=torch.float64)

    monkeypatch.setattr(fair, "errors", errors)
    given = {"epochs": 9, "patience": 3, "batch": 8, "lr": 1e-3, "seed": 0}
    assert fair.train(network, molecules, data.split(7), **given) == (2, 5)
    kept = network.state_dict()
    assert all(torch.equal(kept[k], x) for k, x in states[1].items())
    assert not all(torch.equal(kept[k], x) for k, x in states[4].items())


def test_p_values():
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.4, 0.2, 0.15]
    plain = stats.ttest_1samp(values, 0.0).pvalue
    assert fair.p_value(values, 0.0) == pytest.approx(plain, rel=1e-10)
    assert fair.p_value(values, 0.125) > plain  # training sets overlap: less sure
    assert fair.p_value([-x for x in values], 0.1) == pytest.approx(fair.p_value(values, 0.1))
    assert math.isnan(fair.p_value([0.3], 0.1))
    assert fair.p_value([0.2, 0.2], 0.1) == 0 and fair.p_value([0.0, 0.0], 0.1) == 1


def test_holm():
    values = {"a": 0.001, "b": 0.02, "c": 0.024, "d": 0.9}
    assert fair.holm(values, 0.05) == {"a"}  # b > 0.05 / 3, and c waits for b
    assert fair.holm({"a": 0.001, "b": 0.016, "c": 0.024, "d": 0.04}, 0.05) == {*"abcd"}
    assert fair.holm({"a": float("nan"), "b": 0.001}, 0.05) == {"b"}


def test_differences_larger_than_chance_are_marked():
    """Five splits with one target that a pooling doubles and one where it scatters."""
    found = []
    for split, noise in enumerate([0.3, -0.2, 0.1, -0.3, 0.1]):
        for pooling, size in (("abp", "own"), ("mean", "equal"), ("max", "equal")):
            if pooling == "max" and split == 4:
                continue  # not there yet: the pairs that are there count
            factor = 1.0 if pooling == "abp" else 2.0
            row = {"split": str(split), "seed": "0", "pooling": pooling, "size": size}
            row |= {"train": "600", "test": "60"}
            row["mae a, eV"] = f"{factor * (1 + 0.01 * noise):.6f}"
            row["mae b, eV"] = f"{1 + (noise if pooling != 'abp' else 0):.6f}"
            found.append(row)
    marked = fair.compared(found, "mean", "equal")
    assert marked["mae a, eV"][3] and not marked["mae b, eV"][3]
    assert marked["mae a, eV"][1] / marked["mae a, eV"][0] == pytest.approx(2.0)
    text = fair.table(found, "equal").splitlines()
    assert text[0] == "| target | ABP | mean | max |"
    assert text[2].endswith("| 2.00* | 2.00* |") and "*" not in text[3]
