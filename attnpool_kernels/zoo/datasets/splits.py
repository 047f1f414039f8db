"""The published ways to divide a data set, as index recipes that need neither sklearn nor files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..molecules import Split


def two_stage(count: int, seeds: Iterable[int]) -> dict[int, Split]:
    """Train 80 %, then the rest halved: two calls of sklearn's ``train_test_split``.

    The test sizes are 0.2 and then 0.5 with the same seed both times; sizes of picked parts are
    rounded up. On 7211 molecules: 5768, 721, 722.
    """

    def picked(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.RandomState(seed).permutation(n)
        size = int(np.ceil(fraction * n))
        return order[size:], order[:size]

    splits = {}
    for seed in seeds:
        train, rest = picked(count, 0.2, seed)
        val, test = picked(len(rest), 0.5, seed)
        splits[seed] = Split(*(torch.from_numpy(i) for i in (train, rest[val], rest[test])))
    return splits


def shuffled(lengths: Sequence[int], seeds: Iterable[int]) -> dict[int, Split]:
    """Train, val, test of the given lengths: ``torch.utils.data.random_split`` with a CPU generator
    seeded with each of the seeds."""
    train, val, test = lengths
    splits = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(sum(lengths), generator=generator, device="cpu")
        splits[seed] = Split(*order.split([train, val, test]))
    return splits


def eighty_ten_ten(count: int, seeds: Iterable[int], val_extra: int = 0) -> dict[int, Split]:
    """⌊0.8·N⌋ to train, ⌊0.1·N⌋ + val_extra for validation, the rest to test; see ``shuffled``."""
    train = int(count * 0.8)
    val = min(int(count * 0.1) + val_extra, count - train)
    return shuffled((train, val, count - train - val), seeds)


def kept(splits: dict[int, Split], keep: torch.Tensor) -> dict[int, Split]:
    """The same splits without the molecules of which ``keep`` [B] is False, renumbered."""
    place = keep.cumsum(0) - 1

    def of(index: torch.Tensor) -> torch.Tensor:
        return place[index[keep[index]]]

    return {seed: Split(of(s.train), of(s.val), of(s.test)) for seed, s in splits.items()}
