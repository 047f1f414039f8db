"""Poolings on QM7b at equal size: which differences are more than chance?

One SchNet predicts all 14 targets; only the pooling differs. Attention-based pooling has parameters
of its own, so every other pooling is trained twice: with the same backbone ("own"), and with one so
wide that both have the same number of parameters ("equal"). All have the same optimiser, batches,
most epochs, and stop when the validation error (mean over the targets, in standard deviations) has
not fallen for ``--patience`` epochs; the weights of the best epoch are tested.

    python -m benchmarks.studies.fair --data qm7b.npz --minutes 480

A run is a row of ``fair.csv``, written when it ends; those that are there are not repeated, so the
command may be stopped and given again. ``--table`` prints the comparison of what is there: test
errors, mean over splits and seeds, as multiples of those of ABP, and whether the difference is
significant: t-test of the differences paired by split and seed, with the variance of Nadeau and
Bengio (2003) for training sets that overlap, corrected after Holm for the 14 targets.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..measuring.provenance import provenance
from .qm7b import Table, errors

if TYPE_CHECKING:  # the table needs no model
    from attnpool_kernels.zoo.model import PooledModel
    from attnpool_kernels.zoo.molecules import Molecules, MoleculeSet, Split

# name -> (pooling of the zoo, where the head acts); OWA has no orbital coefficients here
POOLINGS = {
    "abp": ("abp", "molecule"),
    "sum": ("sum", "molecule"),
    "mean": ("mean", "molecule"),
    "max": ("max", "molecule"),
    "softmax": ("softmax", "molecule"),
    "weighted": ("weighted", "molecule"),
    "sum of atom outputs": ("sum", "atom"),
}
SIZES = ("equal", "own")
LEVEL = 0.05
RUN = ("split", "seed", "pooling", "size", "width")
# Rows are compared where these are equal: molecules of the three parts, and how was trained.
SETTING = ("interactions", "train", "val", "test", "epochs", "patience", "batch", "lr")
ABOUT = ("parameters", "best_epoch", "run_epochs", "cpu_s")
PREFIX = "mae "  # of the columns of the targets


def config(pooling: str, width: int, interactions: int, targets: int) -> dict[str, Any]:
    kind, head = POOLINGS[pooling]
    sizes = {"hidden_channels": width, "num_filters": width, "num_interactions": interactions}
    return {
        "backbone": "schnet",
        "backbone_options": {**sizes, "cutoff": 5.0},
        "pooling": kind,
        "pooling_options": {"hidden": width, "heads": 8, "seeds": 8} if kind == "abp" else {},
        "head": head,
        "targets": targets,
    }


def build(pooling: str, width: int, interactions: int, targets: int) -> PooledModel:
    from attnpool_kernels.zoo.model import PooledModel

    return PooledModel.from_config(config(pooling, width, interactions, targets))


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def equal_width(pooling: str, width: int, interactions: int, targets: int) -> int:
    """The width with which a pooling has the parameters of ABP at ``width``, as nearly as can be.

    Even, since the head halves it.
    """
    wanted = parameters(build("abp", width, interactions, targets))
    low, high = width // 2, 2 * width  # in halves
    while high - low > 1:
        middle = (low + high) // 2
        if parameters(build(pooling, 2 * middle, interactions, targets)) <= wanted:
            low = middle
        else:
            high = middle
    ends = (2 * low, 2 * high)
    return min(
        ends, key=lambda w: abs(parameters(build(pooling, w, interactions, targets)) - wanted)
    )


def train(
    network: PooledModel,
    molecules: Molecules,
    split: Split,
    *,
    epochs: int,
    patience: int,
    batch: int,
    lr: float,
    seed: int,
    each: Callable[[int, float], None] = lambda epoch, score: None,
) -> tuple[int, int]:
    """Leaves the best weights in the network; the epochs of these and of the end, from 1.

    Adam on the L1 of standardised targets; the learning rate halves after each third of the
    patience without a better validation error.
    """
    columns = list(range(molecules.y.shape[1]))  # type: ignore[union-attr]
    y = molecules.y[split.train].double()  # type: ignore[index]
    mean, std = y.mean(0), y.std(0)
    atoms = float(molecules.ptr.diff()[split.train].double().mean())
    network.set_statistics(mean, std, atoms=atoms)
    optimiser = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=max(1, patience // 3) - 1
    )
    order = torch.Generator().manual_seed(seed)
    best, kept, epoch = (float("inf"), 0), None, 0
    for epoch in range(1, epochs + 1):
        network.train()
        for rows in split.train[torch.randperm(len(split.train), generator=order)].split(batch):
            part = molecules.select(rows)
            loss = ((network(part) - part.y) / std.to(part.y)).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimiser.step()
        score = float((errors(network, molecules, split.val, columns) / std).mean())
        schedule.step(score)
        each(epoch, score)
        if score < best[0]:
            best, kept = (score, epoch), copy.deepcopy(network.state_dict())
        elif epoch - best[1] >= patience:
            break
    assert kept is not None, "no epoch had a finite validation error"
    network.load_state_dict(kept)
    return best[1], epoch


def study(options: argparse.Namespace, data: MoleculeSet) -> None:
    """Trains what the results do not hold yet, until the time is over."""
    names = [f"{PREFIX}{t.name}, {t.unit}" for t in data.targets]
    sheet = Table(options.out / "fair.csv", (*RUN, *SETTING, *ABOUT, *names))
    done = {tuple(row[k] for k in (*RUN, *SETTING)) for row in sheet.read()}
    molecules = data.molecules.to(dtype=torch.float32)
    end = time.monotonic() + 60 * options.minutes
    sizes = [options.width, options.interactions, len(names)]
    widths = {(p, "own"): options.width for p in options.poolings}
    if "equal" in options.sizes:
        others = [p for p in options.poolings if p != "abp"]
        widths |= {(p, "equal"): equal_width(p, *sizes) for p in others}
    runs = [  # ABP once, with the first of the sizes
        (seed, split, pooling, size)
        for seed in options.seeds
        for place, one in enumerate(options.sizes)
        for split in options.splits
        for pooling, size in widths
        if (size == one if pooling != "abp" else place == 0)
    ]
    begun = False
    for number, (seed, name, pooling, size) in enumerate(runs, 1):
        whole = data.split(name)
        split = type(whole)(
            whole.train[: options.train], whole.val[: options.val], whole.test[: options.test]
        )
        run = (name, seed, pooling, size, widths[pooling, size])
        parts = {part: len(index) for part, index in vars(split).items()}
        setting = [parts.get(k, getattr(options, k)) for k in SETTING]
        if tuple(map(str, (*run, *setting))) in done:
            continue
        if time.monotonic() > end:
            print("out of time, see --minutes", file=sys.stderr)
            return
        if not begun:
            told = {k: v for k, v in vars(options).items() if k not in ("data", "out", "table")}
            sheet.comment(json.dumps(provenance("cpu", told)))
            begun = True
        torch.manual_seed(seed)
        network = build(pooling, widths[pooling, size], options.interactions, len(names))
        cpu = time.process_time()

        head = f"{number}/{len(runs)} {pooling}, {size}"

        def each(epoch: int, score: float, head: str = head) -> None:
            print(f"{head}, epoch {epoch}: {score:.4f} of std", file=sys.stderr, flush=True)

        best, last = train(
            network,
            molecules,
            split,
            epochs=options.epochs,
            patience=options.patience,
            batch=options.batch,
            lr=options.lr,
            seed=seed,
            each=each,
        )
        tested = errors(network, molecules, split.test, list(range(len(names))))
        about = (parameters(network), best, last, time.process_time() - cpu)
        values = (*run, *setting, *about, *map(float, tested))
        sheet.add([dict(zip(sheet.columns, values, strict=True))])


def last_setting(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that can be compared with the last one."""
    return [r for r in rows if all(r[k] == rows[-1][k] for k in SETTING)]


def compared(
    rows: Sequence[dict[str, str]], pooling: str, size: str
) -> dict[str, tuple[float, float, float, bool]]:
    """Of each target: the mean error of ABP and of a pooling, p, and whether it is significant.

    Over the splits and seeds that both have; p is nan for fewer than two of them.
    """
    theirs = _by_pair(rows, pooling, size)
    ours = _by_pair(rows, "abp", "own")
    pairs = [key for key in ours if key in theirs]
    found, shares = {}, {}
    for target in targets_of(rows):
        a, b = ([float(x[key][target]) for key in pairs] for x in (ours, theirs))
        ratio = [int(ours[key]["test"]) / int(ours[key]["train"]) for key in pairs]
        shares[target] = p_value([y - x for x, y in zip(a, b)], max(ratio, default=0.0))
        count = max(1, len(pairs))
        found[target] = sum(a) / count, sum(b) / count
    kept = holm(shares, LEVEL)
    return {t: (*found[t], shares[t], t in kept) for t in found}


def _by_pair(
    rows: Iterable[dict[str, str]], pooling: str, size: str
) -> dict[tuple[str, str], dict[str, str]]:
    return {
        (r["split"], r["seed"]): r for r in rows if (r["pooling"], r["size"]) == (pooling, size)
    }


def targets_of(rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns of a table that hold errors."""
    return [name for name in rows[0] if name.startswith(PREFIX)]


def p_value(differences: Sequence[float], share: float) -> float:
    """Two-sided, of paired differences over training sets that overlap.

    share: molecules to test over molecules to train; the variance of the mean is (1/n + share)
    times that of a difference (Nadeau and Bengio 2003).
    """
    from scipy import stats

    count = len(differences)
    if count < 2:
        return float("nan")
    values = torch.tensor(differences, dtype=torch.float64)
    error = float(values.var() * (1 / count + share)) ** 0.5
    if error == 0:
        return float(values.mean() == 0)
    return float(2 * stats.t.sf(abs(float(values.mean())) / error, count - 1))


def holm(values: dict[str, float], level: float) -> set[str]:
    """The names whose hypotheses fall at ``level`` for all of them together."""
    kept: set[str] = set()
    ordered = sorted(values.items(), key=lambda x: (math.isnan(x[1]), x[1]))
    for rank, (name, p) in enumerate(ordered):
        if not p <= level / (len(values) - rank):
            break
        kept.add(name)
    return kept


def table(rows: Sequence[dict[str, str]], size: str) -> str:
    """A line a target: the error of ABP ± its spread, and the others' as multiples of it."""
    others = [p for p in POOLINGS if p != "abp" and _by_pair(rows, p, size)]
    lines = ["| target | ABP | " + " | ".join(others) + " |", "|---" * (len(others) + 2) + "|"]
    found = {p: compared(rows, p, size) for p in others}
    own = list(_by_pair(rows, "abp", "own").values())
    for target in targets_of(rows):
        values = torch.tensor([float(r[target]) for r in own], dtype=torch.float64)
        spread = float(values.std()) if len(values) > 1 else 0.0
        cells = [target.removeprefix(PREFIX), f"{float(values.mean()):.3g} ± {spread:.2g}"]
        for pooling in others:
            ours, theirs, _, sure = found[pooling][target]
            cells.append(f"{theirs / ours:.2f}" + ("*" if sure else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.studies.fair",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", help="qm7b.npz, or its folder")
    p.add_argument("--poolings", nargs="+", choices=POOLINGS, default=list(POOLINGS))
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    p.add_argument("--splits", nargs="+", type=int, default=[23887, 386333, 514094, 572909])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--width", type=int, default=128, help="of the backbone and of ABP")
    p.add_argument("--interactions", type=int, default=3)
    for part in ("train", "val", "test"):
        p.add_argument(f"--{part}", type=int, help="at most so many molecules (default: all)")
    p.add_argument("--epochs", type=int, default=100, help="at most (default: 100)")
    p.add_argument("--patience", type=int, default=12, help="epochs (default: 12)")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--minutes", type=float, default=480.0, help="no run begins after them")
    p.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    p.add_argument("--table", action="store_true", help="only the comparison of what is there")
    return p


def main(given: list[str] | None = None) -> int:
    options = parser().parse_args(given)
    if not options.table:
        from attnpool_kernels.zoo.datasets import load

        study(options, load("qm7b", options.data))
    rows = Table(options.out / "fair.csv", ()).read()
    if not rows:
        print(f"error: no results in {options.out}", file=sys.stderr)
        return 2
    rows = last_setting(rows)
    print(", ".join(f"{k} {rows[0][k]}" for k in SETTING))
    for size in SIZES:
        print(f"\n{size} parameters\n{table(rows, size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
