"""The pooling in SchNetPack's place: with its dictionaries, and with the library where it is."""

import importlib.util

import pytest
import torch

from attnpool_kernels.nn import AttentionPooling, SumPooling
from attnpool_kernels.zoo import libraries
from attnpool_kernels.zoo.schnetpack import PooledAtomwise

IDX_M = torch.tensor([0, 0, 0, 1, 2, 2])


def inputs(**more):
    return {"scalar_representation": torch.randn(6, 8), "_idx_m": IDX_M, **more}


def test_dictionary_in_and_out():
    layer = PooledAtomwise(SumPooling(), torch.nn.Linear(8, 1), output_key="energy")
    given = inputs(_n_atoms=torch.tensor([3, 1, 2, 0]))  # the last molecule is empty
    out = layer(given)
    assert out is given and layer.model_outputs == ["energy"]
    sums = torch.zeros(4, 8).index_add(0, IDX_M, given["scalar_representation"])
    torch.testing.assert_close(out["energy"], layer.head(sums).squeeze(1))
    assert layer(inputs())["energy"].shape == (3,)


def test_bad_input():
    layer = PooledAtomwise(SumPooling())
    with pytest.raises(ValueError, match="batch"):
        layer(inputs(_n_atoms=torch.tensor([6])))
    with pytest.raises(ValueError, match="batch"):
        layer({"scalar_representation": torch.randn(6, 8), "_idx_m": IDX_M.flip(0)})


def test_schnetpack_trains_on_forces():
    if importlib.util.find_spec("schnetpack") is None:
        pytest.skip("schnetpack is not installed")
    spk = libraries.schnetpack()
    radial = spk.nn.GaussianRBF(8, 5.0)
    model = spk.model.NeuralNetworkPotential(
        representation=spk.representation.SchNet(
            n_atom_basis=16,
            n_interactions=2,
            radial_basis=radial,
            cutoff_fn=spk.nn.CosineCutoff(5.0),
        ),
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[
            PooledAtomwise(
                AttentionPooling(16, 16, heads=2, seeds=4), torch.nn.Linear(16, 1), "energy"
            ),
            spk.atomistic.Forces(energy_key="energy", force_key="forces"),
        ],
    )
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and IDX_M[i] == IDX_M[j]]
    idx_i, idx_j = torch.tensor(pairs).T
    batch = {
        "_atomic_numbers": torch.tensor([8, 1, 1, 2, 6, 8]),
        "_positions": torch.randn(6, 3),
        "_idx_m": IDX_M,
        "_n_atoms": torch.tensor([3, 1, 2]),
        "_idx_i": idx_i,
        "_idx_j": idx_j,
        "_offsets": torch.zeros(len(pairs), 3),
    }
    out = model.train()(batch)
    assert out["energy"].shape == (3,) and out["forces"].shape == (6, 3)
    (out["forces"] - 0.1).square().sum().backward()
    assert model.output_modules[0].pool.encoders[0].mab.attn.in_proj_weight.grad.any()
