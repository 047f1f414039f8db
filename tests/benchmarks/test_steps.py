"""The study of SchNet's steps: it runs, compares, and says what it cannot do."""

import pytest

pytest.importorskip("torch_geometric")

from benchmarks.measuring import sheet
from benchmarks.studies import steps


def test_a_case_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "found.csv"
    assert steps.main(["--cases", "tiny", "--budget", "0.01", "--output", str(path)]) == 0
    rows, runs = sheet.read(path)
    assert [row.what for row in rows[::2]] == list(steps.WHATS) and len(runs) == 1
    assert [row.contender for row in rows] == [*steps.NAMES] * 3
    assert all(row.timed and 0 <= row.error < 1e-4 for row in rows)
    assert "times faster" in capsys.readouterr().out


def test_the_two_go_different_ways():
    case = steps.CASES["tiny"]
    z, pos, ragged, cells = *_places(steps.batch(case, None)[1]), None
    ways = [steps.build(case, name).backbone for name in steps.NAMES]
    taken = [way.with_filters(z, pos, ragged, cells, True) is not None for way in ways]
    assert taken == [False, True]


def _places(molecules):
    return molecules.z, molecules.pos, molecules.ragged


def test_a_wrong_number_is_seen(monkeypatch):
    case = steps.CASES["tiny"]
    molecules = steps.batch(case, None)[1]
    assert steps.compare(case, molecules, "force step")[1] == ""
    right = steps.build

    def wrong(case, name):
        model = right(case, name)
        if name == "pairs":
            model.backbone.interactions[0].mlp[0].bias.data += 1e-9
        return model

    monkeypatch.setattr(steps, "build", wrong)
    assert "apart in float64" in steps.compare(case, molecules, "force step")[1]


def test_wrong_options(tmp_path, capsys):
    for arguments, words in (
        (["--cases", "gpt"], "--cases"),
        (["--data", str(tmp_path / "none.npz")], "--data"),
    ):
        assert steps.main([*arguments, "--output", str(tmp_path / "x.csv")]) == 2
        assert words in capsys.readouterr().err
