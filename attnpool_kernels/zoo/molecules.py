"""Molecules as the models and data sets of the zoo hold them: one molecule after another.

Positions are in ångström and energies in eV from here on; loaders convert what their files hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..ragged import Ragged


@dataclasses.dataclass(frozen=True)
class Target:
    """A property of a molecule: its name and the unit of its values."""

    name: str
    unit: str


@dataclasses.dataclass
class Molecules:
    """A batch, or a whole data set: B molecules, N atoms, T targets.

    z: [N] int64 atomic numbers. pos: [N, 3] in Å. ptr: [B + 1] int64, molecule i owns the atoms
    ptr[i]:ptr[i+1]. y: [B, T]. forces: [N, 3], -∂E/∂pos in the unit of the energy per Å.
    coefficients: [N], share of each atom in the orbital of the target (OE62).

    Raises ValueError for shapes that disagree and for boundaries that do not cover the atoms.
    """

    z: Tensor
    pos: Tensor
    ptr: Tensor
    y: Tensor | None = None
    forces: Tensor | None = None
    coefficients: Tensor | None = None

    def __post_init__(self) -> None:
        atoms, count = self.z.shape[0], self.ptr.shape[0] - 1
        wanted = {"z": (atoms,), "pos": (atoms, 3), "forces": (atoms, 3), "coefficients": (atoms,)}
        for name, shape in wanted.items():
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
        if self.y is not None and (self.y.dim() != 2 or self.y.shape[0] != count):
            raise ValueError(f"y must have shape [{count}, T], got {tuple(self.y.shape)}")
        last = Ragged(self.ptr)._last
        if last is not None and last != atoms:
            raise ValueError(f"ptr[-1] must be the number of atoms, {atoms}, got {last}")

    def __len__(self) -> int:
        return self.ptr.shape[0] - 1

    @property
    def ragged(self) -> Ragged:
        return Ragged(self.ptr)

    @property
    def batch(self) -> Tensor:
        """[N] molecule of each atom."""
        return torch.repeat_interleave(self.ptr.diff(), output_size=self.z.shape[0])

    def select(self, index: Tensor | Iterable[int]) -> Molecules:
        """The molecules of ``index`` [M], in that order, copied."""
        index = torch.as_tensor(index, dtype=torch.int64)
        counts = self.ptr.diff()[index]
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        atoms = torch.arange(int(ptr[-1])) + (self.ptr[index] - ptr[:-1]).repeat_interleave(counts)

        def of(values: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if values is None else values[rows]

        return Molecules(
            self.z[atoms], self.pos[atoms], ptr,
            of(self.y, index), of(self.forces, atoms), of(self.coefficients, atoms),
        )  # fmt: skip

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Molecules:
        """On another device, and with floating point tensors in another dtype."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                floating = dtype if value.is_floating_point() else None
                values[field.name] = value.to(device=device, dtype=floating)
        return Molecules(**values)

    @classmethod
    def from_ase(cls, atoms: Iterable) -> Molecules:
        """From ``ase.Atoms``, without targets; positions of ASE are in Å."""
        import numpy as np

        atoms = list(atoms)
        counts = torch.tensor([len(a) for a in atoms], dtype=torch.int64)
        z = np.concatenate([a.numbers for a in atoms] or [np.empty(0, int)])
        pos = np.concatenate([a.positions for a in atoms] or [np.empty((0, 3))])
        return cls(
            torch.from_numpy(z.astype("int64")), torch.from_numpy(pos.astype("float64")),
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices [M] int64 of the molecules to train on, to choose the model with, and to test on."""

    train: Tensor
    val: Tensor
    test: Tensor


@dataclasses.dataclass
class MoleculeSet:
    """A data set in memory: molecules with targets, and its published splits by seed."""

    name: str
    molecules: Molecules
    targets: tuple[Target, ...]
    splits: Mapping[int, Split]

    def __len__(self) -> int:
        return len(self.molecules)

    def target(self, name: str) -> int:
        """Column of y of a target; ValueError with the known names."""
        names = [t.name for t in self.targets]
        if name not in names:
            raise ValueError(f"target must be one of {', '.join(names)}, got {name!r}")
        return names.index(name)

    def split(self, seed: int | None = None) -> Split:
        """The split of a seed, by default of the first; ValueError with the known seeds."""
        if seed is None:
            seed = next(iter(self.splits))
        if seed not in self.splits:
            known = ", ".join(str(s) for s in self.splits)
            raise ValueError(f"split seed must be one of {known}, got {seed}")
        return self.splits[seed]

    def statistics(self, target: str, seed: int | None = None) -> tuple[float, float]:
        """Mean and standard deviation (of the N, not N - 1) of a target over the train split.

        ValueError for a train split without molecules.
        """
        column, train = self.target(target), self.split(seed).train
        if not len(train):
            raise ValueError(f"{self.name} has no molecules to train on, of {len(self)} in all")
        assert self.molecules.y is not None
        values = self.molecules.y[train, column].double()
        return float(values.mean()), float(values.std(correction=0))

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(self.molecules.z.unique().tolist())
