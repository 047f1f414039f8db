"""Which atoms a seed looks at: a pooling trained on real molecules, drawn and as a table.

Run: python examples/seed_attention.py [picture.png]
Needs ase, for its molecules of the G2 set and their enthalpies of formation, and matplotlib for a
picture.
"""

import sys

import torch

try:
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors
    from ase.data.g2 import data as g2
    from ase.symbols import Symbols
except ImportError as error:
    raise SystemExit(f"needs ase: pip install ase ({error})") from None

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling

SHOWN = "C4H4NH"  # pyrrole
HEADS, SEEDS = 2, 2


class Model(torch.nn.Module):
    """Atoms as element and surroundings; attention pooling to one number."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.element, self.neighbour = (torch.nn.Embedding(20, width) for _ in range(2))
        self.mix = torch.nn.Linear(width, width)
        self.pool = AttentionPooling(width, width, 1, heads=HEADS, seeds=SEEDS, encoder_blocks=1)
        self.per_atom = torch.nn.Embedding(20, 1)

    def atoms(self, z: torch.Tensor, pos: torch.Tensor, sets: Ragged) -> torch.Tensor:
        batch = sets.batch()
        near = torch.exp(-torch.cdist(pos, pos).square() / 2) * (batch[:, None] == batch)
        return torch.nn.functional.silu(self.element(z) + self.mix(near @ self.neighbour(z)))

    def forward(self, z: torch.Tensor, pos: torch.Tensor, sets: Ragged) -> torch.Tensor:
        sums = torch.zeros(len(sets)).index_add(0, sets.batch(), self.per_atom(z)[:, 0])
        return self.pool(self.atoms(z, pos, sets), sets)[:, 0] + sums


def batch(names: list[str]) -> tuple[torch.Tensor, torch.Tensor, Ragged]:
    z = [torch.tensor(Symbols.fromsymbols(g2[name]["symbols"]).numbers) for name in names]
    pos = [torch.tensor(g2[name]["positions"], dtype=torch.float32) for name in names]
    return torch.cat(z), torch.cat(pos), Ragged.from_counts([len(x) for x in z])


def looked_at(model: Model, name: str) -> torch.Tensor:
    """Weights [seeds, atoms] of one molecule, the mean over the heads."""
    z, pos, sets = batch([name])
    weights = model.pool.weights(model.atoms(z, pos, sets), sets)
    return weights.detach().view(SEEDS, len(z), HEADS).mean(2)


def draw(model: Model, name: str, path: str) -> None:
    """The molecule seen along its thinnest direction, once a seed; the stronger, the larger."""
    from matplotlib.figure import Figure

    z, pos, _ = batch([name])
    flat = (pos - pos.mean(0)) @ torch.linalg.svd(pos - pos.mean(0), full_matrices=False)[2].t()
    figure = Figure((3.2 * SEEDS, 3.2), layout="constrained")
    for seed, (axes, weights) in enumerate(zip(figure.subplots(1, SEEDS), looked_at(model, name))):
        for i in range(len(z)):
            for j in range(i):
                if (pos[i] - pos[j]).norm() < 1.2 * sum(covalent_radii[z[k]] for k in (i, j)):
                    axes.plot(*flat[[i, j], :2].t(), color="0.7", lw=2, zorder=0)
        colors = jmol_colors[z]
        axes.scatter(*flat[:, :2].t(), s=40 + 2500 * weights, c=colors, ec="0.3", alpha=0.85)
        for place, number, weight in zip(flat.tolist(), z.tolist(), weights.tolist()):
            axes.annotate(f"{Symbols([number])}\n{weight:.2f}", place[:2], ha="center", va="center")
        axes.set(title=f"{name}, seed {seed + 1}", aspect="equal")
        axes.margins(0.25)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def main(steps: int = 150, path: str | None = None) -> list[float]:
    """Returns the loss of every step, in (100 kcal/mol)²."""
    torch.manual_seed(0)
    names = [name for name in g2 if len(g2[name]["positions"]) > 1]
    target = torch.tensor([g2[name]["enthalpy"] for name in names]) / 100
    given = batch(names)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        loss = (model(*given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    print(f"{SHOWN}: weights of the atoms")
    symbols = list(Symbols.fromsymbols(g2[SHOWN]["symbols"]))
    print("        " + "".join(f"{symbol:>6}" for symbol in symbols))
    for seed, weights in enumerate(looked_at(model, SHOWN)):
        print(f"seed {seed + 1}  " + "".join(f"{x:6.2f}" for x in weights.tolist()))
    if path is not None:
        draw(model, SHOWN, path)
    return losses


if __name__ == "__main__":
    main(path=sys.argv[1] if len(sys.argv) > 1 else None)
