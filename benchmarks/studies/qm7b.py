"""QM7b with every pooling: the claim of attention-based pooling, at a size that two cores can do.

One model predicts four targets at once, from the same backbone, optimiser, number of epochs and
order of molecules; only the pooling differs. The weights of the epoch with the lowest validation
error (mean over the targets, in standard deviations) are tested. Writes one row a target into
``qm7b.csv``, the curves into ``qm7b-curves.csv``, and draws both: ``--draw`` alone draws again.

    python -m benchmarks.studies.qm7b --data qm7b.npz --epochs 25
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..measuring.provenance import provenance
from ..measuring.sheet import COMMENT

if TYPE_CHECKING:  # drawing needs no model
    from attnpool_kernels.zoo.molecules import Molecules, MoleculeSet, Split

TARGETS = ("homo_gw", "lumo_gw", "atomization_energy_pbe0", "polarizability_pbe0")
BACKBONES = {
    "schnet": {"hidden_channels": 128, "num_filters": 128, "num_interactions": 3, "cutoff": 5.0},
    "dimenet++": {
        "hidden_channels": 64,
        "num_blocks": 2,
        "int_emb_size": 32,
        "basis_emb_size": 8,
        "out_emb_channels": 64,
        "num_spherical": 5,
        "num_radial": 6,
        "cutoff": 3.0,
    },
}
# name -> (pooling of the zoo, where the head acts, options)
POOLINGS: dict[str, tuple[str, str, dict]] = {
    "sum": ("sum", "molecule", {}),
    "mean": ("mean", "molecule", {}),
    "max": ("max", "molecule", {}),
    "abp": ("abp", "molecule", {"hidden": 128, "heads": 8, "seeds": 8}),
    "sum of atom outputs": ("sum", "atom", {}),
}
RESULTS = (
    "backbone",
    "pooling",
    "split",
    "target",
    "unit",
    "test_mae",
    "constant_mae",
    "best_epoch",
    "epochs",
    "parameters",
    "cpu_s_per_epoch",
)
CURVES = ("backbone", "pooling", "split", "epoch", "target", "val_mae", "train_loss")


class Table:
    """A CSV file that rows are appended to, with a comment line of provenance for each run."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns

    def read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(line for line in file if not line.startswith("#")))

    def comment(self, text: str) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            if new:
                csv.writer(file).writerow(self.columns)
            file.write(COMMENT + text + "\n")

    def add(self, rows: list[dict]) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            for row in rows:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )


def model(backbone: str, pooling: str, targets: int) -> torch.nn.Module:
    from attnpool_kernels.zoo.model import PooledModel

    kind, head, options = POOLINGS[pooling]
    config = {
        "backbone": backbone,
        "backbone_options": BACKBONES[backbone],
        "pooling": kind,
        "pooling_options": options,
        "head": head,
        "targets": targets,
    }
    return PooledModel.from_config(config)


@torch.no_grad()
def errors(
    network: torch.nn.Module,
    molecules: Molecules,
    index: torch.Tensor,
    columns: list[int],
    batch: int = 256,
) -> torch.Tensor:
    """[T] mean absolute errors, in the units of the targets."""
    network.eval()
    total = torch.zeros(len(columns), dtype=torch.float64)
    for rows in index.split(batch):
        part = molecules.select(rows)
        total += (network(part).double() - part.y[:, columns].double()).abs().sum(0)
    return total / len(index)


def train(
    network: torch.nn.Module,
    molecules: Molecules,
    split: Split,
    columns: list[int],
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    each: Callable[[int, torch.Tensor, float], None],
) -> tuple[int, float]:
    """Trains with Adam on the L1 of standardised targets, and takes the best weights.

    Gives their epoch and the CPU seconds of an epoch; ``each`` is told (epoch, errors, loss).
    """
    y = molecules.y[split.train][:, columns].double()
    mean, std = y.mean(0), y.std(0)
    atoms = float(molecules.ptr.diff()[split.train].double().mean())
    network.set_statistics(mean, std, atoms=atoms)
    optimiser = torch.optim.Adam(network.parameters(), lr)
    steps = -(-len(split.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, epochs=epochs, steps_per_epoch=steps, pct_start=0.1
    )
    order = torch.Generator().manual_seed(seed)
    best, kept, cpu = (float("inf"), -1), None, 0.0
    for epoch in range(epochs):
        network.train()
        start, loss_sum = time.process_time(), 0.0
        for rows in split.train[torch.randperm(len(split.train), generator=order)].split(batch):
            part = molecules.select(rows)
            loss = ((network(part) - part.y[:, columns]) / std.to(part.y)).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimiser.step()
            schedule.step()
            loss_sum += float(loss.detach()) * len(rows)
        cpu += time.process_time() - start
        mae = errors(network, molecules, split.val, columns)
        score = float((mae / std).mean())
        if score < best[0]:
            best, kept = (score, epoch), copy.deepcopy(network.state_dict())
        each(epoch, mae, loss_sum / len(split.train))
    assert kept is not None, "no epoch had a finite validation error"
    network.load_state_dict(kept)
    return best[1], cpu / epochs


def study(arguments: argparse.Namespace, data: MoleculeSet) -> None:
    """Trains and tests every pooling on every split that the results do not hold yet."""
    results = Table(arguments.out / "qm7b.csv", RESULTS)
    curves = Table(arguments.out / "qm7b-curves.csv", CURVES)
    done = {(r["backbone"], r["pooling"], r["split"]) for r in results.read()}
    options = {k: v for k, v in vars(arguments).items() if k not in ("data", "out", "draw")}
    told = json.dumps(provenance("cpu", options))
    columns = [data.target(name) for name in TARGETS]
    units = [data.targets[c].unit for c in columns]
    molecules = data.molecules.to(dtype=torch.float32)
    runs = [(s, p) for s in arguments.splits for p in arguments.poolings]
    runs = [(s, p) for s, p in runs if (arguments.backbone, p, str(s)) not in done]
    if runs:
        results.comment(told)
        curves.comment(told)
    begun = time.monotonic()
    for i, (seed, pooling) in enumerate(runs):
        split = data.split(seed)
        if arguments.molecules:
            split = type(split)(*(part[: arguments.molecules] for part in vars(split).values()))
        torch.manual_seed(seed)
        network = model(arguments.backbone, pooling, len(columns))
        name = {"backbone": arguments.backbone, "pooling": pooling, "split": seed}

        def each(epoch, mae, loss, name=name, i=i):
            curves.add(
                [
                    {**name, "epoch": epoch, "target": t, "val_mae": float(e), "train_loss": loss}
                    for t, e in zip(TARGETS, mae, strict=True)
                ]
            )
            share = (i + (epoch + 1) / arguments.epochs) / len(runs)
            left = (time.monotonic() - begun) * (1 / share - 1)
            told = " ".join(f"{float(e):.4f}" for e in mae)
            print(
                f"{i + 1}/{len(runs)} {name['pooling']} {name['split']} epoch {epoch + 1}: "
                f"validation MAE {told}, {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )

        best, cpu = train(
            network,
            molecules,
            split,
            columns,
            epochs=arguments.epochs,
            each=each,
            batch=arguments.batch,
            lr=arguments.lr,
            seed=seed,
        )
        tested = errors(network, molecules, split.test, columns)
        y = data.molecules.y
        constant = (y[split.test] - y[split.train].mean(0)).abs().mean(0)[columns]
        parameters = sum(p.numel() for p in network.parameters())
        results.add(
            [
                {
                    **name,
                    "target": t,
                    "unit": u,
                    "test_mae": float(e),
                    "constant_mae": float(c),
                    "best_epoch": best,
                    "epochs": arguments.epochs,
                    "parameters": parameters,
                    "cpu_s_per_epoch": cpu,
                }
                for t, u, e, c in zip(TARGETS, units, tested, constant, strict=True)
            ]
        )


def table(rows: list[dict[str, str]]) -> str:
    """Test MAE, mean over the splits, one line a backbone and pooling."""
    names = dict.fromkeys((r["backbone"], r["pooling"]) for r in rows)
    units = {r["target"]: r["unit"] for r in rows}
    lines = ["| backbone, pooling | " + " | ".join(f"{t}, {u}" for t, u in units.items()) + " |"]
    lines.append("|---" * (len(units) + 1) + "|")

    def line(title, chosen, column):
        cells = []
        for target in units:
            found = [float(r[column]) for r in chosen if r["target"] == target and r[column]]
            cells.append(f"{sum(found) / len(found):.4f}" if found else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for backbone, pooling in names:
        chosen = [r for r in rows if (r["backbone"], r["pooling"]) == (backbone, pooling)]
        splits = len({r["split"] for r in chosen})
        line(f"{backbone}, {pooling} ({splits} splits)", chosen, "test_mae")
    line("constant: mean of the training set", rows, "constant_mae")
    return "\n".join(lines)


def _labelled(axis) -> list[tuple]:
    """Lines and labels of a panel."""
    return list(zip(*axis.get_legend_handles_labels()))


def draw(folder: Path) -> Path:
    """Validation error against the epoch, one panel a target, mean over the splits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = Table(folder / "qm7b-curves.csv", CURVES).read()
    results = Table(folder / "qm7b.csv", RESULTS).read()
    backbones = list(dict.fromkeys(r["backbone"] for r in results))
    figure, axes = plt.subplots(
        len(backbones), len(TARGETS), squeeze=False, figsize=(13, 3.4 * len(backbones))
    )
    # Colours of Okabe and Ito, and a marker each: told apart by colour-blind eyes, and in grey.
    looks = [("#0072b2", "s"), ("#009e73", "^"), ("#e69f00", "v"), ("#111111", "o")]
    looks.append(("#cc79a7", "D"))
    for row, backbone in zip(axes, backbones, strict=True):
        for axis, target in zip(row, TARGETS, strict=True):
            mine = [r for r in results if (r["backbone"], r["target"]) == (backbone, target)]
            for pooling, (colour, marker) in zip(POOLINGS, looks, strict=True):
                by_epoch: dict[int, list[float]] = {}
                for r in curves:
                    key = r["backbone"], r["target"], r["pooling"]
                    if key == (backbone, target, pooling) and r["epoch"] and r["val_mae"]:
                        by_epoch.setdefault(int(r["epoch"]) + 1, []).append(float(r["val_mae"]))
                if by_epoch:
                    means = [sum(v) / len(v) for v in by_epoch.values()]
                    thick = 2.4 if pooling == "abp" else 1.2
                    look = {"color": colour, "marker": marker, "markersize": 4, "lw": thick}
                    axis.semilogy(list(by_epoch), means, label=pooling, **look)
            constant = next((float(r["constant_mae"]) for r in mine if r["constant_mae"]), None)
            if constant is not None:
                axis.axhline(constant, color="k", ls=":", lw=1, label="mean of the training set")
            if mine:
                axis.set_ylabel(f"validation MAE, {mine[0]['unit']}")
            axis.set_title(f"{backbone}: {target}", fontsize=9)
            axis.set_xlabel("epoch")
            if axis.get_yscale() == "log":  # it has a curve
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    handles = {label: line for axis in axes.flat for line, label in _labelled(axis)}
    if handles:
        figure.legend(handles.values(), handles, loc="lower center", ncol=6, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path = folder / "qm7b.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.qm7b",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="qm7b.npz, or its folder")
    parser.add_argument("--backbone", choices=BACKBONES, default="schnet")
    parser.add_argument(
        "--poolings", nargs="+", choices=POOLINGS, default=["abp", "sum", "mean", "max"]
    )
    parser.add_argument("--splits", nargs="+", type=int, default=[23887, 386333])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="largest of a one-cycle schedule")
    parser.add_argument("--molecules", type=int, help="at most so many of each part of the split")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--draw", action="store_true", help="only the table and the figure")
    arguments = parser.parse_args(given)
    if not arguments.draw:
        from attnpool_kernels.zoo.datasets import load

        study(arguments, load("qm7b", arguments.data))
    rows = Table(arguments.out / "qm7b.csv", RESULTS).read()
    if not rows:
        parser.error(f"no results in {arguments.out}")
    print(table(rows))
    print(f"\nfigure: {draw(arguments.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
