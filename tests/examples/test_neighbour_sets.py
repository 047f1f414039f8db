"""Energy and forces of the neighbour-set example are continuous where an atom leaves the cutoff."""

import runpy
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "neighbour_sets.py"


@pytest.fixture
def example():
    return runpy.run_path(str(PATH))


def results(example, model, distance):
    """Energy and forces of three atoms, one of which is ``distance`` from the first."""
    positions = torch.tensor(
        [[0.0, 0.0, 0.0], [1.1, 0.3, 0.0], [0.0, 0.0, distance]], dtype=torch.float64
    ).requires_grad_()
    lists = example["neighbours"](positions, torch.zeros(3, dtype=torch.int64))
    energy = model(positions, *lists)
    return energy.sum().detach(), example["forces"](energy, positions, train=False), lists[1]


def jump(example, model):
    """How much energy and forces change over a step of 2e-5 across the cutoff."""
    cutoff = example["CUTOFF"]
    energy, force, inside = results(example, model, cutoff - 1e-5)
    other_energy, other_force, outside = results(example, model, cutoff + 1e-5)
    assert len(inside) == len(outside) + 2
    return abs(energy - other_energy).item(), (force - other_force).abs().max().item()


def test_energy_and_forces_are_continuous_across_the_cutoff(example):
    torch.manual_seed(0)
    model = example["Model"](layers=2).double()
    energy, force = jump(example, model)
    assert energy < 1e-9
    assert force < 1e-4  # grows with the step, as the second derivative of the cutoff is not 0
    scale = results(example, model, 1.5)[1].abs().max().item()
    assert force < 1e-2 * scale


def test_without_the_key_bias_they_are_not(example, monkeypatch):
    """The test above sees what it should: with the bias left out, atoms vanish at full weight."""
    torch.manual_seed(0)
    model = example["Model"](layers=2).double()
    attend = example["Layer"].forward.__globals__["set_attention"]

    def without(q, k, v, sets, key_bias):
        return attend(q, k, v, sets)

    monkeypatch.setitem(example["Layer"].forward.__globals__, "set_attention", without)
    energy, force = jump(example, model)
    assert energy > 1e-4 and force > 1e-4


def test_forces_are_the_derivative_of_the_energy(example):
    torch.manual_seed(0)
    model = example["Model"]().double()
    force = results(example, model, 1.9)[1][2, 2].item()
    up, down = (results(example, model, 1.9 + sign * 1e-5)[0].item() for sign in (1, -1))
    assert force == pytest.approx(-(up - down) / 2e-5, rel=1e-6)
