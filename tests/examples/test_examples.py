"""Every example runs and learns, in a process of its own, as a user would run it."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Of each example the packages besides torch; the test below knows whether that is all.
NEEDS = {
    "pyg_gin": ["torch_geometric"],
    "pyg_gps": ["torch_geometric"],
    "seed_attention": ["ase"],
    "pyg_schnet": ["torch_geometric"],
    "schnetpack_forces": ["schnetpack"],
    "plain_torch": [],
    "neighbour_sets": [],
    "compiled_forces": [],
    "allscaip_attention": [],
    "md_forces": ["torch_geometric", "ase"],
    "pet_metatrain": ["metatrain", "ase"],
}
SMALL = """
import json, runpy, sys
sys.modules |= dict.fromkeys(sys.argv[2:])  # as if these were not installed
import torch
torch.set_num_threads(1)
print(json.dumps(runpy.run_path(sys.argv[1])["main"](steps=60)))
"""


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES} == set(NEEDS)


def run(path):
    """Nothing of this process helps: no import that is done, nothing patched."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    blocked = [] if NEEDS[path.stem] else ["torch_geometric", "ase", "lightning", "schnetpack"]
    return subprocess.run(
        [sys.executable, "-c", SMALL, str(path), *blocked],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    absent = [name for name in NEEDS[path.stem] if importlib.util.find_spec(name) is None]
    found = run(path)
    if absent:
        assert found.returncode == 1
        assert found.stderr.count("\n") == 1 and f"needs {absent[0]}" in found.stderr
        return
    assert found.returncode == 0, found.stderr
    *printed, losses = found.stdout.splitlines()
    losses = json.loads(losses)
    assert len(losses) == 60 and sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert printed[0].startswith("step   0  loss") or printed[0].startswith("step    0  loss")


@pytest.mark.parametrize(
    ("path", "package"),
    [(path, name) for path in EXAMPLES for name in NEEDS.get(path.stem, [])],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_what_it_needs_is_said_in_one_line(monkeypatch, path, package):
    """Without the package, which here is there: Python prints the text of SystemExit, exit 1."""
    for name in [package, *sys.modules]:
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path))
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    assert "needs " in caught.value.code and "pip install" in caught.value.code
    assert package in caught.value.code
