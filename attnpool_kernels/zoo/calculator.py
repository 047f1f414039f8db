r"""Pooled models as calculators of ASE: geometry optimisation, molecular dynamics, vibrations.

::

    atoms.calc = PooledCalculator("runs/ethanol/best.ckpt")
    atoms.get_potential_energy(), atoms.get_forces()      # eV, eV/Å

Dynamics conserve energy if the model's energy has a continuous derivative. Of the parts of a model
these have not: "relu", the default activation of ABP (take ``activation="silu"`` or
"shifted_softplus"), "max" pooling, and a backbone whose messages do not vanish at its cutoff: an
atom that crosses it then changes the energy in a jump. SchNet's and PaiNN's messages end with a
cosine, (1 + cos πr/r_c) / 2, whose value and slope are 0 there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from .model import PooledModel
from .molecules import Molecules, charge_and_spin
from .periodic import energy_forces_stress


class PooledCalculator(Calculator):
    """Energies in eV and forces in eV/Å of a pooled model, for ``ase.Atoms``.

    Args:
        model: a ``PooledModel`` of one target, an energy in eV, or the path of a checkpoint of
            ``zoo fit`` (the file, or the folder of the run for its best one). It is copied, and
            evaluated without dropout.
        device: default: that of the model, the CPU for a checkpoint.
        dtype: of the weights, float32 or float64; default: as they are. Distances are computed in
            float64, and mean and std of the target applied in it, whatever the dtype: a total
            energy has more digits than a float32 holds.
        periodic: whether to take structures that repeat, of which there is a stress, too. The
            models of the zoo are trained on molecules: it is for models of one's own.
        elements: atomic numbers that are allowed; default: those that a checkpoint was trained on,
            those that the backbone can embed otherwise.
        options: of ``ase.calculators.calculator.Calculator``: label, directory, atoms.

    Properties: "energy", "free_energy" (the same number), "forces", -∂E/∂r, and with ``periodic``
    "stress", ∂E/∂ε / V in eV/Å³ and Voigt's order, for relaxations of cells and NPT. There are no
    energies of atoms: attention pools vectors, not energies. Results are those of the last
    molecule that was calculated, and nothing is left of the one before, even if that fails. After
    a change of ``model`` call ``reset()``.

    The models know neither charge nor spin: molecules that state them, in ``atoms.info`` or as
    initial charges and moments, are calculated all the same, with one warning for each of the
    values that a calculator meets.

    Raises ValueError: a target that is not one energy in eV; for an ``Atoms`` object that is
    periodic, empty or has another element. PropertyNotImplementedError: any other property.
    TypeError: an option that is none, such as charge.

    Examples:
        >>> from ase.build import molecule
        >>> from attnpool_kernels.zoo.backbones import backbone
        >>> sizes = dict(hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=4)
        >>> water = molecule("H2O")
        >>> water.calc = PooledCalculator(PooledModel(backbone("schnet", **sizes), "sum"))
        >>> water.get_forces().shape
        (3, 3)
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012, as in ASE
    results: dict[str, Any]

    def __init__(
        self,
        model: PooledModel | str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        elements: Sequence[int] | None = None,
        periodic: bool = False,
        **options,
    ) -> None:
        super().__init__(**options)
        self.periodic = periodic
        if periodic:
            self.implemented_properties = [*self.implemented_properties, "stress"]
        self._told: set[str] = set()
        if isinstance(model, str | Path):
            model, elements = _loaded(model, elements)
        elif not isinstance(model, PooledModel):
            raise TypeError(f"model must be a PooledModel or a path, got {type(model).__name__}")
        if model.targets != 1:
            raise ValueError(f"model must have one target, the energy, got {model.targets}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        known = model.backbone.elements
        self.elements = frozenset(range(1, known + 1) if elements is None else elements)
        self.model = copy.deepcopy(model).to(device, dtype).eval().requires_grad_(False)
        for name in ("mean", "std", "atomref"):
            setattr(self.model, name, getattr(model, name).to(device, torch.float64))

    def set(self, **parameters) -> dict:
        """As of ASE's calculators, but this one has no parameters: TypeError for any."""
        if parameters:
            raise TypeError(
                f"PooledCalculator has no option {next(iter(parameters))!r}; the models know "
                "elements and positions only"
            )
        return super().set()

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] | None = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fills ``results``; forces only where they are among the properties.

        None stands for all that are implemented. Results that are there already are kept for the
        same atoms only, whatever ``system_changes`` says.
        """
        if isinstance(properties, str):
            raise TypeError(f"properties must be a list of names, got {properties!r}")
        if properties is None:
            properties = self.implemented_properties
        for name in properties:
            if name not in self.implemented_properties:
                raise PropertyNotImplementedError(
                    f"properties must be among {', '.join(self.implemented_properties)}, got "
                    f"{name!r}"
                )
        of = self.atoms if atoms is None else atoms
        if of is None:
            raise ValueError("atoms must be given in the first call")
        # A new dictionary, not an emptied one: somebody may hold that of the molecule before.
        kept = {} if atoms is None or self.check_state(atoms) else self.results
        self.results = {}
        super().calculate(atoms, properties, system_changes)
        molecules = self._checked(of)
        if "stress" in properties:
            found = energy_forces_stress(self.model, molecules, create_graph=False)
            energy, forces, stress = (x.double().cpu() for x in found)
            voigt = full_3x3_to_voigt_6_stress(stress[0].numpy())
            kept = kept | {"forces": forces.numpy(), "stress": voigt}
        elif "forces" in properties:
            energy, forces = self.model.energy_and_forces(molecules, create_graph=False)
            kept = kept | {"forces": forces.double().cpu().numpy()}
        else:
            with torch.no_grad():
                energy = self.model(molecules)
        self.results = kept | {"energy": energy.item(), "free_energy": energy.item()}

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True):
        """As of ASE's calculators, with the reason why there are no energies of atoms."""
        if name in ("energies", "stresses"):
            raise PropertyNotImplementedError(
                f"{name} per atom are not defined: the model pools vectors of atoms to one energy "
                "of the molecule, which is not a sum over atoms"
            )
        return super().get_property(name, atoms, allow_calculation)

    def _checked(self, atoms: Atoms) -> Molecules:
        if not len(atoms):
            raise ValueError("atoms must have at least one atom, got none")
        if atoms.pbc.any() and not self.periodic:
            raise ValueError(
                f"atoms must not be periodic, got pbc={atoms.pbc.tolist()}: the models know "
                "molecules only; for a molecule in a box set atoms.pbc = False"
            )
        unknown = sorted(set(atoms.numbers.tolist()) - self.elements)
        if unknown:
            raise ValueError(
                f"atoms must be of elements that the model knows ({_symbols(self.elements)}), got "
                f"{_symbols(unknown)}"
            )
        stated = charge_and_spin(atoms)
        if stated and stated not in self._told:
            self._told.add(stated)
            warnings.warn(
                f"{atoms.get_chemical_formula()} states {stated}, which is not used: the models "
                "know elements and positions only",
                stacklevel=3,
            )
        return Molecules.from_ase([atoms], warn=False, periodic=self.periodic).to(
            self.model.std.device
        )


def _symbols(numbers) -> str:
    ordered = sorted(numbers)
    if len(ordered) > 12:
        return f"{chemical_symbols[ordered[0]]} to {chemical_symbols[ordered[-1]]}"
    return ", ".join(chemical_symbols[z] if z < len(chemical_symbols) else str(z) for z in ordered)


def _loaded(
    path: str | Path, elements: Sequence[int] | None
) -> tuple[PooledModel, Sequence[int] | None]:
    """The model of a checkpoint and its elements."""
    from .predict import load_task

    task = load_task(path)
    target = task.targets[0]
    if len(task.targets) == 1 and target.unit != "eV":
        raise ValueError(
            f"model must have an energy in eV as its target, got {target.name} in {target.unit!r}"
        )
    return task.model, elements or task.elements or None
