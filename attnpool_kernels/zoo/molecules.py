"""Molecules as the models and data sets of the zoo hold them: one molecule after another.

Positions are in ångström and energies in eV from here on; loaders convert what their files hold.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ragged import Ragged

if TYPE_CHECKING:
    import ase

# Names under which programs put charge and spin into atoms.info, and the value of a closed shell.
_CLOSED_SHELL = {
    "charge": 0,
    "total_charge": 0,
    "net_charge": 0,
    "spin": 0,
    "total_spin": 0,
    "magmom": 0,
    "mult": 1,
    "multiplicity": 1,
    "spin_multiplicity": 1,
}


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
    coefficients: [N], share of each atom in the orbital of the target (OE62). cell: [B, 3, 3] in Å,
    a vector a row, of structures that repeat along those where pbc [B, 3] is True; both or none.

    Raises ValueError for shapes that disagree and for boundaries that do not cover the atoms.

    Examples:
        >>> water = Molecules(torch.tensor([8, 1, 1]), torch.randn(3, 3), torch.tensor([0, 3]))
        >>> len(water), water.batch.tolist()
        (1, [0, 0, 0])
    """

    z: Tensor
    pos: Tensor
    ptr: Tensor
    y: Tensor | None = None
    forces: Tensor | None = None
    coefficients: Tensor | None = None
    cell: Tensor | None = None
    pbc: Tensor | None = None

    def __post_init__(self) -> None:
        atoms, count = self.z.shape[0], self.ptr.shape[0] - 1
        wanted: dict[str, tuple[int, ...]] = {"z": (atoms,), "pos": (atoms, 3)}
        wanted |= {"forces": (atoms, 3), "coefficients": (atoms,)}
        wanted |= {"cell": (count, 3, 3), "pbc": (count, 3)}
        if (self.cell is None) != (self.pbc is None):
            raise ValueError("cell and pbc must both be given or neither")
        for name, shape in wanted.items():
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
        if self.y is not None and (self.y.dim() != 2 or self.y.shape[0] != count):
            raise ValueError(f"y must have shape [{count}, T], got {tuple(self.y.shape)}")
        last = Ragged(self.ptr).last
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
        index = torch.as_tensor(index, dtype=torch.int64, device=self.ptr.device)
        counts = self.ptr.diff()[index]
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = (self.ptr[index] - ptr[:-1]).repeat_interleave(counts)
        atoms = torch.arange(int(ptr[-1]), device=ptr.device) + shift

        def of(values: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if values is None else values[rows]

        return Molecules(
            self.z[atoms],
            self.pos[atoms],
            ptr,
            of(self.y, index),
            of(self.forces, atoms),
            of(self.coefficients, atoms),
            of(self.cell, index),
            of(self.pbc, index),
        )

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
    def from_ase(
        cls, atoms: Iterable[ase.Atoms], warn: bool = True, periodic: bool = False
    ) -> Molecules:
        """From ``ase.Atoms``, without targets; positions of ASE are in Å.

        periodic: keep the cells of periodic structures, for which molecular models are not made.

        Raises ValueError for periodic structures unless ``periodic``, and for cells without a
        volume. Warns once of those that state a charge or a spin (see ``charge_and_spin``), which
        no model here knows of, unless ``warn`` is False.
        """
        import numpy as np

        atoms = list(atoms)
        for i, one in enumerate(atoms):
            if periodic and one.pbc.any() and not abs(one.cell.complete().volume) > 1e-6:
                raise ValueError(f"cell must have a volume, that of structure {i} has none")
            if one.pbc.any() and not periodic:
                raise ValueError(
                    f"atoms must not be periodic, molecule {i} has pbc={one.pbc.tolist()}; for a "
                    "molecule in a box set atoms.pbc = False"
                )
        if warn:
            stated = {i: text for i, one in enumerate(atoms) if (text := charge_and_spin(one))}
            warn_of_charges(stated, len(atoms), stacklevel=3)
        counts = torch.tensor([len(a) for a in atoms], dtype=torch.int64, device="cpu")
        z = np.concatenate([a.numbers for a in atoms] or [np.empty(0, int)])
        pos = np.concatenate([a.positions for a in atoms] or [np.empty((0, 3))])
        cell = pbc = None
        if any(a.pbc.any() for a in atoms):
            # Vectors along which nothing repeats may be absent; any others are as good.
            cell = torch.from_numpy(np.stack([a.cell.complete().array for a in atoms]))
            pbc = torch.from_numpy(np.stack([a.pbc for a in atoms]))
        return cls(
            torch.from_numpy(z.astype("int64")),
            torch.from_numpy(pos.astype("float64")),
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            cell=cell,
            pbc=pbc,
        )


def charge_and_spin(atoms: ase.Atoms) -> str:
    """What atoms say of a charge or a spin other than that of a neutral closed shell, or "".

    Looked at are ``atoms.info``, the parameters of the calculator, and the sums of the initial
    charges and magnetic moments. A plain word "charge" in the comment of an xyz file counts too.
    """
    found: dict[str, object] = {}
    for held in (getattr(atoms.calc, "parameters", None), atoms.info):
        if isinstance(held, Mapping):
            found |= {str(k): v for k, v in held.items() if str(k).lower() in _CLOSED_SHELL}
    results = getattr(atoms.calc, "results", None)
    if isinstance(results, Mapping) and "magmom" in results:
        found["magmom"] = results["magmom"]
    stated = []
    for name, value in found.items():
        try:
            neutral = (
                value is None
                or str(value).lower() in ("none", "neutral")
                or (
                    value is not True and abs(float(value) - _CLOSED_SHELL[name.lower()]) < 0.01  # type: ignore[arg-type]
                )
            )
        except (TypeError, ValueError):
            neutral = False
        if not neutral:
            stated.append(name if value is True else f"{name}={value}")
    for name, sum_of in (
        ("initial charges", atoms.get_initial_charges().sum()),
        ("initial magnetic moments", atoms.get_initial_magnetic_moments().sum()),
    ):
        if abs(sum_of) > 0.01:
            stated.append(f"{name} of {sum_of:.3g} in all")
    return ", ".join(stated)


def warn_of_charges(stated: Mapping[int, str], count: int, where: str = "", stacklevel: int = 2):
    """One warning for all of the molecules of ``stated``, by their numbers; none for none."""
    if stated:
        first = next(iter(stated.items()))
        warnings.warn(charges_text(first, len(stated), count, where), stacklevel=stacklevel)


def charges_text(first: tuple[int, str], stated: int, count: int, where: str = "") -> str:
    """What is said of ``stated`` of ``count`` molecules, of which the first is that one."""
    return (
        f"{where}{stated} of {count} molecules state a charge or a spin (molecule {first[0]}: "
        f"{first[1]}), which is not used: the models know elements and positions only"
    )


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices [M] int64 of the molecules to train on, to choose the model with, and to test on."""

    train: Tensor
    val: Tensor
    test: Tensor


@dataclasses.dataclass
class MoleculeSet:
    """A data set in memory: molecules with targets, and its published splits by seed.

    Examples:
        >>> z, pos, y = torch.tensor([1, 1]), torch.zeros(2, 3), torch.tensor([[1.0], [3.0]])
        >>> two = Molecules(z, pos, torch.tensor([0, 1, 2]), y)
        >>> split = Split(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
        >>> MoleculeSet("two", two, (Target("energy", "eV"),), {7: split}).statistics("energy")
        (1.0, 0.0)
    """

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
