"""The two attentions of AllScAIP without padding and without a dense mask, trained on forces.

Run: python examples/allscaip_attention.py
Needs nothing but torch. With the shapes of its configuration, 10 heads of 64 channels: first the
neighbours of each atom attend to each other, with distances in queries and keys (64 channels times
5 frequencies, 320 wide) and the logarithm of a smooth envelope as bias of a key; then all atoms of
a system attend to each other. There neighbours are padded to a fixed number, and a dense N x N mask
keeps systems apart; here both are the same call with other boundaries. Toy task: Morse forces.
"""

import math

import torch
from torch import Tensor

from attnpool_kernels import Ragged, set_attention

CUTOFF, HEADS, WIDTH, FREQUENCIES = 2.6, 10, 64, 5


class Block(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = HEADS * WIDTH
        self.edge, self.atom = (torch.nn.Linear(dim, 3 * inner) for _ in range(2))
        self.edge_out, self.atom_out = (torch.nn.Linear(inner, dim) for _ in range(2))

    def forward(
        self, x: Tensor, edges: Tensor, distance: Tensor, rows: Ragged, systems: Ragged
    ) -> Tensor:
        """x [N, dim] of the atoms; edges [E, dim], distance [E] and rows: by centre, as in CSR."""
        q, k, v = self.edge(edges).unflatten(1, (3, HEADS, WIDTH)).unbind(1)
        waves = (distance[:, None] * torch.arange(1, FREQUENCIES + 1) * math.pi / CUTOFF).cos()
        q, k = ((y[..., None] * waves[:, None, None]).flatten(2) for y in (q, k))
        envelope = 0.5 * ((distance * math.pi / CUTOFF).cos() + 1)
        log_envelope = envelope.clamp(min=1e-15).log()
        messages = set_attention(q, k, v, rows, key_bias=log_envelope, scale=WIDTH**-0.5)
        weighted = self.edge_out(messages.flatten(1)) * envelope[:, None]
        x = x.index_add(0, rows.batch(len(edges)), weighted)
        q, k, v = self.atom(x).unflatten(1, (3, HEADS, WIDTH)).unbind(1)
        return x + self.atom_out(set_attention(q, k, v, systems).flatten(1))


class Model(torch.nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.start = torch.nn.Parameter(torch.randn(dim))
        self.edge = torch.nn.Sequential(
            torch.nn.Linear(11, dim), torch.nn.SiLU(), torch.nn.Linear(dim, dim)
        )
        self.block = Block(dim)
        self.head = torch.nn.Sequential(
            torch.nn.LayerNorm(dim), torch.nn.Linear(dim, dim), torch.nn.SiLU()
        )
        self.last = torch.nn.Linear(dim, 1)

    def forward(self, pos: Tensor, index: Tensor, rows: Ragged, systems: Ragged) -> Tensor:
        """Energy [N] of every atom; index [2, E]: centre and neighbour, sorted by centre."""
        vector = pos[index[1]] - pos[index[0]]
        distance = vector.norm(dim=1)
        waves = (distance[:, None] * torch.arange(1, 8) * math.pi / CUTOFF).sin()
        edges = self.edge(torch.cat([vector, distance[:, None], waves], 1))
        x = self.block(self.start.expand(len(pos), -1), edges, distance, rows, systems)
        return self.last(self.head(x)).squeeze(1)


def systems_of(count: int) -> tuple[Tensor, Ragged]:
    """Clusters of 5 to 9 atoms on some sites of a cubic lattice, shaken."""
    sizes = torch.randint(5, 10, (count,)).tolist()
    sites = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    pos = torch.cat([1.2 * sites[torch.randperm(27)[:n]] for n in sizes])
    return pos + 0.15 * torch.randn_like(pos), Ragged.from_counts(sizes)


def main(steps: int = 60, count: int = 4) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        pos, systems = systems_of(count)
        pos.requires_grad_()
        batch = systems.batch()
        distance = torch.cdist(pos.detach(), pos.detach())
        near = ((distance < CUTOFF) & (batch[:, None] == batch)).fill_diagonal_(False)
        index = near.nonzero().t()
        rows = Ragged.from_counts(near.sum(1))
        away = (pos[index[0]] - pos[index[1]]).norm(dim=1)
        truth = 0.5 * ((1 - torch.exp(-1.5 * (away - 1.2))) ** 2).sum()
        (wanted,) = torch.autograd.grad(truth, pos)
        energy = model(pos, index, rows, systems).sum()
        (found,) = torch.autograd.grad(energy, pos, create_graph=True)
        loss = (found - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss on forces {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
