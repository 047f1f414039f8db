"""Every example runs and learns."""

import importlib.util
import runpy
import typing
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"pyg_gin": "torch_geometric", "pyg_schnet": "torch_geometric",
         "schnetpack_forces": "schnetpack", "plain_torch": "",
         "md_forces": "torch_geometric ase"}  # fmt: skip


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, capsys):
    for package in NEEDS[name].split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    loader = torch.utils.data.dataloader
    if not hasattr(loader, "T_co"):  # a name that schnetpack 2.1 imports and newer torch lacks
        loader.T_co = typing.TypeVar("T_co", covariant=True)
    losses = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](steps=60)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert "loss" in capsys.readouterr().out
