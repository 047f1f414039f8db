"""torch_geometric's SchNet with attention-based pooling, trained on energies and forces.

Run: python examples/pyg_schnet.py
Needs torch_geometric, but none of its compiled extensions: ``MoleculeGraph`` finds the neighbours.
The energies are those of a Lennard-Jones cluster, in its own units.
"""

import torch

try:
    from torch_geometric.nn import SchNet
except ImportError as error:
    raise SystemExit(f"needs torch_geometric: pip install torch_geometric ({error})") from None

from attnpool_kernels.nn import AttentionPooling
from attnpool_kernels.zoo.pyg import MoleculeGraph, pooled_schnet

CUTOFF = 6.0


def model(width: int = 32) -> torch.nn.Module:
    schnet = SchNet(
        hidden_channels=width,
        num_filters=width,
        num_interactions=2,
        num_gaussians=16,
        cutoff=CUTOFF,
        interaction_graph=MoleculeGraph(CUTOFF),
    )
    # The line to change: the last hidden state is pooled, not a sum of atom energies.
    return pooled_schnet(schnet, AttentionPooling(width, width, heads=4, seeds=4))


def clusters(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Atoms, positions and molecule index: jittered pieces of a cubic lattice."""
    lattice = 1.2 * torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    counts = torch.randint(3, 9, (size,)).tolist()
    pos = torch.cat([lattice[:n] + 0.05 * torch.randn(n, 3) for n in counts])
    batch = torch.repeat_interleave(torch.arange(size), torch.tensor(counts))
    return torch.ones(len(pos), dtype=torch.long), pos, batch


def lennard_jones(pos: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pos = pos.detach().requires_grad_()
    edges, length = MoleculeGraph(1e3)(pos, batch)
    pairs = 2 * (length**-12 - length**-6)  # every pair is there twice
    energy = torch.zeros(int(batch[-1]) + 1).index_add(0, batch[edges[0]], pairs)
    return energy.detach(), -torch.autograd.grad(energy.sum(), pos)[0]


def main(steps: int = 60, size: int = 16) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        z, pos, batch = clusters(size)
        energy, force = lennard_jones(pos, batch)
        pos.requires_grad_()
        found = net(z, pos, batch).squeeze(1)
        # Forces are a derivative, training on them is a second one: the pooling has it.
        found_force = -torch.autograd.grad(found.sum(), pos, create_graph=True)[0]
        loss = 0.1 * (found - energy).square().mean() + (found_force - force).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
