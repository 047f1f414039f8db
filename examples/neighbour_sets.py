"""Forces from attention over neighbourhoods: every atom with its neighbours is a set.

Run: python examples/neighbour_sets.py
Needs nothing but torch. As in the point-edge transformer (Pozdnyakov & Ceriotti 2023), rows are an
atom and the edges to its neighbours, and the logarithm of a smooth cutoff is added to the logits of
an edge (``key_bias``): an atom that leaves the neighbourhood has weight 0 before it is gone, so
energies and forces are continuous. Trained on the forces of a Morse potential.
"""

import math

import torch
from torch import Tensor

from attnpool_kernels import Ragged, set_attention
from attnpool_kernels.layouts import with_centres

CUTOFF = 2.6


class Layer(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, 2 * width),
            torch.nn.SiLU(),
            torch.nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor, sets: Ragged, key_bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        x = x + self.out(set_attention(q, k, v, sets, key_bias=key_bias).flatten(1))
        return x + self.mlp(x)


class Model(torch.nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.centre = torch.nn.Parameter(torch.randn(width))
        self.edge = torch.nn.Sequential(
            torch.nn.Linear(11, width), torch.nn.SiLU(), torch.nn.Linear(width, width)
        )
        self.layers = torch.nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = torch.nn.Linear(width, 1)

    def forward(self, positions: Tensor, row_ptr: Tensor, neighbour: Tensor) -> Tensor:
        """Energy [A] of every atom; neighbour [E] and row_ptr [A + 1]: the list in CSR form."""
        atoms = positions.shape[0]
        centre = torch.repeat_interleave(torch.arange(atoms), row_ptr.diff())
        vector = positions[neighbour] - positions[centre]
        distance = vector.norm(dim=1, keepdim=True)
        waves = torch.sin(distance * torch.arange(1, 8) * math.pi / CUTOFF) / distance
        edges = self.edge(torch.cat([vector, distance, waves], 1))
        cutoff = (0.5 * (torch.cos(distance[:, 0] * math.pi / CUTOFF) + 1)).clamp(min=1e-15)
        x, sets = with_centres(self.centre.expand(atoms, -1), edges, row_ptr)
        key_bias, _ = with_centres(cutoff.new_zeros(atoms), cutoff.log(), row_ptr)
        for layer in self.layers:
            x = layer(x, sets, key_bias)
        return self.head(x[sets.ptr[:-1]]).squeeze(1)  # of the centres alone: no weights needed


def neighbours(positions: Tensor, molecule: Tensor) -> tuple[Tensor, Tensor]:
    """The list in CSR form: row_ptr [A + 1] and neighbour [E]."""
    distance = torch.cdist(positions.detach(), positions.detach())
    near = (distance < CUTOFF) & (molecule[:, None] == molecule)
    near.fill_diagonal_(False)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), near.sum(1).cumsum(0)])
    return row_ptr, near.nonzero()[:, 1]


def draw(molecules: int, atoms: int) -> Tensor:
    """Clusters of atoms on some sites of a cubic lattice, shaken."""
    sites = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    chosen = torch.rand(molecules, len(sites)).argsort(1)[:, :atoms]
    return (1.2 * sites[chosen] + 0.15 * torch.randn(molecules, atoms, 3)).flatten(0, 1)


def morse(positions: Tensor, molecule: Tensor) -> Tensor:
    own = (molecule[:, None] == molecule).triu(1)
    i, j = own.nonzero(as_tuple=True)
    distance = (positions[i] - positions[j]).norm(dim=1)
    return ((1 - torch.exp(-1.5 * (distance - 1.2))) ** 2).sum()


def forces(energy: Tensor, positions: Tensor, train: bool) -> Tensor:
    return -torch.autograd.grad(energy.sum(), positions, create_graph=train)[0]


def main(steps: int = 200, molecules: int = 16, atoms: int = 10) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    molecule = torch.arange(molecules).repeat_interleave(atoms)
    losses = []
    for step in range(steps):
        positions = draw(molecules, atoms).requires_grad_()
        target = forces(morse(positions, molecule), positions, train=False)
        energy = model(positions, *neighbours(positions, molecule))
        loss = torch.nn.functional.l1_loss(forces(energy, positions, train=True), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
