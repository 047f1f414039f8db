"""The generator of bugs, and the committed table of the campaign (tests/tools/mutation.py)."""

import ast
import csv
from pathlib import Path

from tools import mutants

ROOT = Path(__file__).parent.parent
TABLE = Path(mutants.__file__).with_name("mutation.csv")
PYTHON = '''\
@cache
def f(x, n: int = 1, *, keep=True):
    """Adds 1 + 2."""
    if n < 2:
        raise ValueError(f"n is {n + 1}")
    total = 0
    total += -x.sum().to(torch.float64)
    return g(total, x, dim=0), n
'''
TEXT = """\
// i < n
for (int i = 0; i < n + 1; ++i) sum += a[i];
  wait_for(all);
"""


def changed(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    return {(x.operator, x.apply(text)) for x in mutants.of_file(tmp_path / name, tmp_path)}


def test_bugs_of_python(tmp_path):
    found = changed("f.py", PYTHON, tmp_path)
    for operator, right, wrong in (
        ("no cache", "@cache", "@(lambda f: f)"),
        ("off by one", "int = 1", "int = 2"),
        ("flag", "keep=True", "keep=False"),
        ("comparison", "n < 2", "n <= 2"),
        ("skipped check", "if n < 2", "if False"),
        ("wrong sum", "total += -", "total = -"),
        ("sign", "-x.sum().to(torch.float64)", "(x.sum().to(torch.float64))"),
        ("other function", "x.sum()", "x.mean()"),
        ("no to", "x.sum().to(torch.float64)", "(x.sum())"),
        ("dtype", "torch.float64", "torch.float32"),
        ("swapped arguments", "g(total, x", "g(x, total"),
        ("dropped keyword", "x, dim=0", "x"),
        ("swapped results", "g(total, x, dim=0), n", "n, g(total, x, dim=0)"),
    ):
        assert (operator, PYTHON.replace(right, wrong)) in found, operator
    for _, text in found:
        ast.parse(text)
        assert "Adds 1 + 2." in text and "n is {n + 1}" in text  # words are left alone


def test_bugs_of_text(tmp_path):
    found = changed("f.cpp", TEXT, tmp_path)
    assert ("off by one", TEXT.replace("; i < n", "; i <= n")) in found
    assert ("off by one", TEXT.replace(" + 1", "")) in found
    assert ("wrong sum", TEXT.replace("+=", "=")) in found
    assert ("dropped statement", TEXT.replace("  wait_for(all);", ";")) in found
    assert all("// i < n" in text for _, text in found)


def test_the_sample_stays_where_other_lines_change(tmp_path):
    (tmp_path / "f.py").write_text(PYTHON)
    names = [x.key for x in mutants.chosen([tmp_path / "f.py"], tmp_path, 5, seed=1)]
    assert len(set(names)) == 5
    more = mutants.chosen([tmp_path / "f.py"], tmp_path, 6, seed=1)
    assert [x.key for x in more][:5] == names
    assert len({x.line for x in more}) == 6
    (tmp_path / "f.py").write_text(f"# a comment\n\n{PYTHON}")
    assert [x.key for x in mutants.chosen([tmp_path / "f.py"], tmp_path, 5, seed=1)] == names


def test_the_table_of_the_campaign():
    """At least 95% are noticed; the others are equivalent, or the table says what is missing."""
    rows = [x for x in csv.DictReader(TABLE.open()) if x["result"] != "does not compile"]
    assert {x["result"] for x in rows} <= {"noticed", "timeout", "survived"}
    survived = [x for x in rows if x["result"] == "survived"]
    assert not [x["key"] for x in survived if not x["reason"]]
    lost = [x for x in survived if x["reason"].startswith("open: ")]
    equivalent = len(survived) - len(lost)
    assert len(lost) <= 0.05 * (len(rows) - equivalent)
    for row in rows:
        assert (ROOT / row["path"]).exists()
