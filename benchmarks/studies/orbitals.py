"""Where the seeds look that predict HOMO and LUMO: ``python -m benchmarks.studies.orbitals``.

Two SchNets with attention-based pooling learn HOMO and LUMO (PBE0) of QM7b, everything else equal.
Of the molecules to test on the weights of the seeds (mean over seeds and heads; they add up to 1
in a molecule) are summed by kind of atom, and divided by the share that such atoms have of the
atoms of their molecule: 1 is looking at all atoms alike. Kinds are elements, and carbon by its
neighbours: four of them, or fewer. Writes ``orbitals.csv`` and draws three molecules into
``orbitals.png``.

A weight is that of a row behind the encoder, in which an atom has already seen the others: a hint
of where a model looks, not a population of an orbital.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..measuring.provenance import provenance
from .fair import train
from .qm7b import Table, errors

if TYPE_CHECKING:
    from attnpool_kernels.zoo.model import PooledModel
    from attnpool_kernels.zoo.molecules import Molecules, MoleculeSet, Split

TARGETS = ("homo_pbe0", "lumo_pbe0")
COLUMNS = ("target", "unit", "test_mae", "constant_mae", "kind", "atoms", "molecules", "looked_at")
COLUMNS += ("train", "test", "best_epoch", "epochs")
SATURATED, UNSATURATED = "C, four neighbours", "C, fewer neighbours"
BOND = 1.25  # of the sum of the covalent radii


def neighbours(molecules: Molecules) -> Tensor:
    """[N] number of bonds of each atom, by distances."""
    from ase.data import covalent_radii

    from attnpool_kernels.zoo.graph import edges

    radii = torch.as_tensor(covalent_radii, dtype=molecules.pos.dtype)[molecules.z]
    source, target = edges(molecules.pos, molecules.ragged, 2 * BOND * float(radii.max()))
    length = (molecules.pos[source] - molecules.pos[target]).norm(dim=1)
    bonded = length < BOND * (radii[source] + radii[target])
    return torch.bincount(target[bonded], minlength=len(molecules.z))


def kinds(molecules: Molecules) -> list[str]:
    """[N] element, or for carbon how many neighbours it has."""
    from ase.data import chemical_symbols

    bonds = neighbours(molecules).tolist()
    carbon = {True: SATURATED, False: UNSATURATED}
    return [
        carbon[count >= 4] if z == 6 else chemical_symbols[z]
        for z, count in zip(molecules.z.tolist(), bonds)
    ]


@torch.no_grad()
def looked_at(model: PooledModel, molecules: Molecules) -> Tensor:
    """[N] weights of the atoms, mean over seeds and heads."""
    rows, ragged = model.backbone.located(molecules.z, molecules.pos, molecules.ragged)
    weights = model.pooling.weights(rows, ragged)  # by molecule, then seed, then atom
    counts, made = ragged.counts().tolist(), []
    seeds = len(weights) // len(molecules.z)
    for part in weights.split([seeds * n for n in counts]):
        made.append(part.view(seeds, -1, weights.shape[1]).mean((0, 2)))
    return torch.cat(made)


def enrichment(
    weights: Tensor, of: Sequence[str], molecules: Molecules
) -> dict[str, tuple[float, int, int]]:
    """Of each kind: weight over share of the atoms, and atoms and molecules behind it.

    Mean over the molecules that have the kind.
    """
    counts = molecules.ptr.diff()
    found = {}
    for kind in sorted(set(of)):
        chosen = torch.tensor([x == kind for x in of])
        index = molecules.batch[chosen]
        weight = torch.zeros(len(counts)).index_add(0, index, weights[chosen].float())
        number = torch.bincount(index, minlength=len(counts))
        has = number > 0
        ratio = weight[has] / (number[has] / counts[has])
        found[kind] = float(ratio.mean()), int(number.sum()), int(has.sum())
    return found


def learned(
    data: MoleculeSet, name: str, split: Split, options: argparse.Namespace
) -> tuple[PooledModel, Molecules, dict[str, Any]]:
    """A model of one target, its test molecules, and what the table says of it."""
    from attnpool_kernels.zoo.model import PooledModel

    column, molecules = data.target(name), data.molecules.to(dtype=torch.float32)
    assert molecules.y is not None
    molecules.y = molecules.y[:, column : column + 1]
    torch.manual_seed(options.seed)
    sizes = {"hidden_channels": options.width, "num_filters": options.width}
    model = PooledModel.from_config(
        {
            "backbone": "schnet",
            "backbone_options": {**sizes, "num_interactions": 2, "cutoff": 5.0},
            "pooling": "abp",
            "pooling_options": {"hidden": options.width, "heads": 4, "seeds": 4}
            | {"encoder_blocks": 1},
        }
    )
    best, last = train(
        model,
        molecules,
        split,
        epochs=options.epochs,
        patience=options.patience,
        batch=32,
        lr=1e-3,
        seed=options.seed,
        each=lambda epoch, score: print(f"{name} epoch {epoch}: {score:.3f}", file=sys.stderr),
    )
    model.eval()
    test = molecules.select(split.test)
    constant = molecules.y[split.train].mean()
    about = {
        "target": name,
        "unit": data.targets[column].unit,
        "test_mae": float(errors(model, molecules, split.test, [0])),
        "constant_mae": float((test.y - constant).abs().mean()),  # type: ignore[operator]
        "train": len(split.train),
        "test": len(test),
        "best_epoch": best,
        "epochs": last,
    }
    return model, test, about


def shown(molecules: Molecules, of: Sequence[str], count: int = 3) -> list[int]:
    """Molecules with the most kinds of atoms, of different sets of kinds."""
    batch = molecules.batch.tolist()
    have: list[set[str]] = [set() for _ in range(len(molecules))]
    for kind, number in zip(of, batch):
        have[number].add(kind)
    found: list[int] = []
    for number in sorted(range(len(have)), key=lambda i: -len(have[i])):
        if have[number] not in [have[i] for i in found]:
            found.append(number)
    return found[:count]


def draw(path: Path, molecules: Molecules, weights: dict[str, Tensor], chosen: list[int]) -> None:
    """A row a target; an atom is the larger, the more is looked at it."""
    from ase.data import chemical_symbols, covalent_radii
    from ase.data.colors import jmol_colors
    from matplotlib.figure import Figure

    figure = Figure((3.4 * len(chosen), 3.4 * len(weights)), layout="constrained")
    panels = figure.subplots(len(weights), len(chosen), squeeze=False)
    for row, (name, values) in zip(panels, weights.items()):
        for axes, number in zip(row, chosen):
            start, end = molecules.ptr[number : number + 2].tolist()
            z, pos = molecules.z[start:end], molecules.pos[start:end].double()
            radii = torch.as_tensor(covalent_radii)[z]
            away = pos - pos.mean(0)
            flat = (away @ torch.linalg.svd(away, full_matrices=False)[2].t())[:, :2]
            for i in range(len(z)):
                for j in range(i):
                    if (pos[i] - pos[j]).norm() < BOND * (radii[i] + radii[j]):
                        axes.plot(*flat[[i, j]].t(), color="0.7", lw=2, zorder=0)
            share = values[start:end] * len(z)
            look = {"c": jmol_colors[z], "ec": "0.3", "alpha": 0.85}
            axes.scatter(*flat.t(), s=30 + 220 * share, **look)
            for place, element, weight in zip(flat.tolist(), z.tolist(), share.tolist()):
                text = f"{chemical_symbols[element]}\n{weight:.1f}"
                axes.annotate(text, place, ha="center", va="center", fontsize=7)
            axes.set(title=name.replace("_pbe0", "").upper(), aspect="equal")
            axes.margins(0.2)
            axes.axis("off")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.studies.orbitals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", help="qm7b.npz, or its folder")
    p.add_argument("--split", type=int, default=23887)
    for part in ("train", "val"):
        p.add_argument(f"--{part}", type=int, help="at most so many molecules (default: all)")
    p.add_argument("--epochs", type=int, default=60, help="at most (default: 60)")
    p.add_argument("--patience", type=int, default=10)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    return p


def main(given: list[str] | None = None) -> int:
    from attnpool_kernels.zoo.datasets import load

    options = parser().parse_args(given)
    return study(options, load("qm7b", options.data))


def study(options: argparse.Namespace, data: MoleculeSet) -> int:
    split = data.split(options.split)
    split = type(split)(split.train[: options.train], split.val[: options.val], split.test)
    sheet = Table(options.out / "orbitals.csv", COLUMNS)
    told = {k: v for k, v in vars(options).items() if k not in ("data", "out")}
    sheet.comment(json.dumps(provenance("cpu", told)))
    drawn: dict[str, Tensor] = {}
    for name in TARGETS:
        model, test, about = learned(data, name, split, options)
        of, drawn[name] = kinds(test), looked_at(model, test)
        for kind, (ratio, atoms, molecules) in enrichment(drawn[name], of, test).items():
            found = {"kind": kind, "atoms": atoms, "molecules": molecules, "looked_at": ratio}
            sheet.add([{**about, **found}])
            print(f"{name} {kind:20} {ratio:.2f} ({atoms} atoms)")
    draw(options.out / "orbitals.png", test, drawn, shown(test, of))
    return 0


if __name__ == "__main__":
    sys.exit(main())
