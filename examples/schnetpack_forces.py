"""SchNetPack's potential with attention-based pooling in the place of ``Atomwise``.

Run: python examples/schnetpack_forces.py
Needs schnetpack 2, see docs/models.md. The data are random positions with the forces of a
harmonic attraction to the molecule's centre.
"""

import torch

from attnpool_kernels.nn import AttentionPooling
from attnpool_kernels.zoo import libraries
from attnpool_kernels.zoo.schnetpack import PooledAtomwise

try:
    # ``import schnetpack``, which fails from torch 2.13 on unless a name is put where it looks.
    schnetpack = libraries.schnetpack()
except ImportError as error:
    raise SystemExit(str(error)) from None


def model(width: int = 32) -> torch.nn.Module:
    return schnetpack.model.NeuralNetworkPotential(
        representation=schnetpack.representation.SchNet(
            n_atom_basis=width,
            n_interactions=2,
            radial_basis=schnetpack.nn.GaussianRBF(16, 5.0),
            cutoff_fn=schnetpack.nn.CosineCutoff(5.0),
        ),
        input_modules=[schnetpack.atomistic.PairwiseDistances()],
        output_modules=[
            # The line to change: it was Atomwise(n_in=width, output_key="energy").
            PooledAtomwise(
                AttentionPooling(width, width, heads=4, seeds=4),
                torch.nn.Linear(width, 1),
                output_key="energy",
            ),
            schnetpack.atomistic.Forces(energy_key="energy", force_key="forces"),
        ],
    )


def batch(size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    counts = torch.randint(3, 8, (size,))
    idx_m = torch.repeat_interleave(torch.arange(size), counts)
    pos = torch.randn(len(idx_m), 3)
    same = idx_m[:, None] == idx_m
    idx_i, idx_j = (same & ~torch.eye(len(idx_m), dtype=torch.bool)).nonzero().T
    centre = torch.zeros(size, 3).index_add(0, idx_m, pos) / counts[:, None]
    away = pos - centre[idx_m]
    energy = torch.zeros(size).index_add(0, idx_m, 0.5 * away.square().sum(1))
    inputs = {
        "_atomic_numbers": torch.ones_like(idx_m),
        "_positions": pos,
        "_idx_m": idx_m,
        "_n_atoms": counts,
        "_idx_i": idx_i,
        "_idx_j": idx_j,
        "_offsets": torch.zeros(len(idx_i), 3),
    }
    return inputs, energy, -away


def main(steps: int = 60, size: int = 16) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    net = model().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        inputs, energy, force = batch(size)
        out = net(inputs)
        loss = 0.1 * (out["energy"] - energy).square().mean()
        loss = loss + (out["forces"] - force).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
