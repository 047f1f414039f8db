"""GPS layers of torch_geometric trained on forces: with its own GPSConv the training step raises.

Run: python examples/pyg_gps.py
Needs torch_geometric. The task: Morse energies and forces of small random clusters.
"""

import torch

try:
    from torch_geometric.nn import GINEConv
except ImportError as error:
    raise SystemExit(f"needs torch_geometric: pip install torch_geometric ({error})") from None

from attnpool_kernels import Ragged
from attnpool_kernels.nn import SumPooling
from attnpool_kernels.zoo.pyg import GPSConv  # the line to change; it was torch_geometric.nn

CUTOFF = 5.0


class Potential(torch.nn.Module):
    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.start = torch.nn.Parameter(torch.zeros(width))
        self.basis = torch.nn.Linear(16, width)
        norm = {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}  # no batch statistics

        def conv() -> GINEConv:
            inner = [torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, width)]
            return GINEConv(torch.nn.Sequential(*inner))

        self.layers = torch.nn.ModuleList(
            GPSConv(width, conv(), heads=4, act="silu", **norm) for _ in range(layers)
        )
        self.head, self.pool = torch.nn.Linear(width, 1), SumPooling()

    def forward(self, pos: torch.Tensor, index: torch.Tensor, sets: Ragged) -> torch.Tensor:
        """Energies [B] from positions [N, 3], edges [2, E] and the molecules."""
        distance = (pos[index[0]] - pos[index[1]]).norm(dim=1, keepdim=True)
        smooth = 0.5 * (torch.cos(torch.pi * distance / CUTOFF) + 1)
        edges = self.basis(torch.exp(-2 * (distance - torch.linspace(0, CUTOFF, 16)) ** 2) * smooth)
        x = self.start.expand(len(pos), -1)
        for layer in self.layers:
            # sets in place of the batch index: all layers share boundaries that are checked once
            x = layer(x, index, sets, edge_attr=edges)
        return self.pool(self.head(x), sets).squeeze(1)


def clusters(count: int) -> tuple[torch.Tensor, torch.Tensor, Ragged]:
    sizes = torch.randint(4, 9, (count,))
    sets = Ragged.from_counts(sizes)
    grid = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    pos = torch.cat([1.6 * grid[torch.randperm(8)[:n]] for n in sizes.tolist()])
    pos = pos + 0.15 * torch.randn_like(pos)
    batch = sets.batch()
    near = (batch[:, None] == batch) & (torch.cdist(pos, pos) < CUTOFF)
    return pos, near.fill_diagonal_(False).nonzero().t(), sets


def morse(pos: torch.Tensor, index: torch.Tensor, sets: Ragged) -> torch.Tensor:
    distance = (pos[index[0]] - pos[index[1]]).norm(dim=1)
    energy = 0.5 * ((1 - torch.exp(-1.2 * (distance - 1.7))) ** 2 - 1)
    return torch.zeros(len(sets)).index_add(0, sets.batch()[index[0]], energy)


def main(steps: int = 60, size: int = 16) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = Potential()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        pos, index, sets = clusters(size)
        pos.requires_grad_()
        truth = morse(pos, index, sets)
        (slope,) = torch.autograd.grad(truth.sum(), pos)
        energy = model(pos, index, sets)
        # create_graph: the loss on forces needs the derivative of this derivative
        (found,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        loss = (found - slope).square().mean() + 0.01 * (energy - truth.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
