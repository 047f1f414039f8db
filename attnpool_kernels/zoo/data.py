"""Molecules in batches, for a ``Trainer`` of Lightning: ``MoleculeData``.

A data set of molecules is small beside its models, so it stays in memory and a batch is cut out of
it where it is needed: no worker processes, no copies, and no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .molecules import Molecules, MoleculeSet, Target


class Batch:
    """The molecules of one process, and the size of the step over all processes.

    Not a tuple or a dataclass: Lightning would convert what is in it to the precision of the
    weights, and in bfloat16 all energies of -2038 eV are the same. Devices change, dtypes do not.
    """

    def __init__(self, molecules: Molecules, total: int, atoms: int) -> None:
        self.molecules = molecules
        self.total, self.atoms = total, atoms  # of all processes

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.molecules.to(device), self.total, self.atoms)


class Batches:
    """Iterates over the molecules of ``index`` in batches; every pass has an order of its own.

    A batch of ``size`` molecules is dealt out to all processes, so that the steps of a training do
    not depend on their number. In training a last batch with fewer molecules than processes is left
    out, because every process must take part in a step.
    """

    def __init__(
        self,
        molecules: Molecules,
        index: Tensor,
        size: int,
        *,
        data: MoleculeData | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.molecules, self.index, self.size = molecules, index, size
        self.data = data  # training: gives the seed and the epoch of the order
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        full, rest = divmod(len(self.index), self.size)
        return full + (rest >= (self.world if self.data is not None else 1))

    def __iter__(self) -> Iterator[Batch]:
        index = self.index
        if self.data is not None:
            generator = torch.Generator().manual_seed(self.data.seed * 1_000_003 + self.data.epoch)
            index = index[torch.randperm(len(index), generator=generator, device="cpu")]
        counts = self.molecules.ptr.diff()
        for part in index.split(self.size)[: len(self)]:
            own = part[self.rank :: self.world]
            if len(own):
                yield Batch(self.molecules.select(own), len(part), int(counts[part].sum()))


class MoleculeData(LightningDataModule):
    """A data set with one of its published splits.

    Args:
        dataset: name of a data set of ``attnpool_kernels.zoo.datasets``, or a ``MoleculeSet``.
        path: file or folder of the data set.
        download: get the files from their source if they are missing.
        options: further options of the loader of the data set.
        targets: names of the targets; None: all of the data set.
        split: seed of the split; None: the first of the data set.
        batch_size: molecules of a step, over all processes.
        seed: of the order of the molecules in training.
        limit: use only the first so many molecules of each part of the split, for trials.

    Positions and targets are held in float64, whatever the precision of a training: what matters
    are their differences, which are small beside them. Forces are held in float32. Raises
    ValueError for names that the data set does not know or that come twice, for empty parts and for
    labels that are not finite.
    """

    def __init__(
        self,
        dataset: str | MoleculeSet,
        path: str | None = None,
        download: bool = False,
        options: dict[str, Any] | None = None,
        targets: Sequence[str] | None = None,
        split: int | None = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.dataset, self.path, self.download = dataset, path, download
        self.options = dict(options or {})
        self.names = None if targets is None else tuple(targets)
        self.split_seed, self.batch_size, self.seed, self.limit = split, batch_size, seed, limit
        self.molecules: Molecules | None = None
        self.targets: tuple[Target, ...] = ()
        self.parts: Mapping[str, Tensor] = {}

    def prepare_data(self) -> None:
        if self.download and isinstance(self.dataset, str):  # once per machine, not per process
            self._load(download=True)

    def setup(self, stage: str | None = None) -> None:
        if self.molecules is not None:
            return
        found = self._load()
        names = self.names or tuple(t.name for t in found.targets)
        if len(set(names)) < len(names):
            raise ValueError(f"targets must differ from each other, got {', '.join(names)}")
        columns = [found.target(name) for name in names]
        split = found.split(self.split_seed)
        if self.split_seed is None:
            self.split_seed = next(iter(found.splits))
        self.targets = tuple(found.targets[i] for i in columns)
        parts = {}
        for part, index in vars(split).items():
            index = torch.as_tensor(index, dtype=torch.int64, device="cpu")[: self.limit]
            if not len(index):
                raise ValueError(f"split must have molecules to {_PURPOSE[part]}, got none")
            parts[part] = index
        self.parts = parts
        given = found.molecules
        if given.y is None:
            raise ValueError(f"dataset must have labels, got {found.name} without them")
        y = given.y[:, columns].double()
        self._check(y)
        if given.forces is not None and not bool(given.forces.isfinite().all()):
            raise ValueError("forces must be finite, got nan or inf")
        self.molecules = Molecules(
            given.z,
            given.pos.double(),
            given.ptr,
            y,
            None if given.forces is None else given.forces.float(),
            None if given.coefficients is None else given.coefficients.float(),
            None if given.cell is None else given.cell.double(),
            given.pbc,
        )

    def _load(self, download: bool = False) -> MoleculeSet:
        if isinstance(self.dataset, MoleculeSet):
            return self.dataset
        from .datasets import DATASETS, load

        if self.dataset not in DATASETS:
            known = ", ".join(DATASETS)
            raise ValueError(f"dataset must be one of {known}, got {self.dataset!r}")

        return load(self.dataset, self.path, download=download, **self.options)

    def _check(self, y: Tensor) -> None:
        for part, index in self.parts.items():
            bad = ~y[index].isfinite()
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"labels must be finite, got {y[index][row, column]} for "
                    f"{self.targets[column].name} of molecule {int(index[row])} ({part})"
                )

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [T] of the targets over the molecules to train on."""
        y = self.ready.y
        assert y is not None
        y = y[self.parts["train"]]
        std = y.std(0, correction=0)
        # The std of equal numbers is not always 0: 2e-13 for 28 of -2038.123456.
        for target, width in zip(self.targets, (y.amax(0) - y.amin(0)).tolist()):
            if not width > 0:
                raise ValueError(
                    f"{target.name} must differ between the molecules to train on, but is the same "
                    f"in all {len(y)}"
                )
        return y.mean(0), std

    @property
    def atoms(self) -> float:
        """Average number of atoms of the molecules to train on."""
        return float(self.ready.ptr.diff()[self.parts["train"]].double().mean())

    @property
    def elements(self) -> list[int]:
        """Atomic numbers that the molecules to train on have."""
        return self.ready.select(self.parts["train"]).z.unique().tolist()

    @property
    def ready(self) -> Molecules:
        """All molecules; loads the data set if that did not happen."""
        self.setup()
        assert self.molecules is not None
        return self.molecules

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about its data: plain values, enough to load them again."""
        name = self.dataset.name if isinstance(self.dataset, MoleculeSet) else self.dataset
        return {
            "dataset": name,
            "path": self.path,
            "options": self.options,
            "targets": [t.name for t in self.targets],
            "split": self.split_seed,
            "limit": self.limit,
        }

    @property
    def epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

    def train_dataloader(self) -> Batches:
        return self._batches("train", data=self)

    def val_dataloader(self) -> Batches:
        return self._batches("val")

    def test_dataloader(self) -> Batches:
        return self._batches("test")

    def _batches(self, part: str, **options: Any) -> Batches:
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        index = self.parts[part]
        if len(index) < world:
            raise ValueError(
                f"devices must not be more than the {len(index)} molecules to {_PURPOSE[part]}, "
                f"got {world}"
            )
        return Batches(self.ready, index, self.batch_size, rank=rank, world=world, **options)


_PURPOSE = {"train": "train on", "val": "choose the model with", "test": "test on"}
