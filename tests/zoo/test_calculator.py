"""Pooled models as ASE calculators: forces, conserved energy, and what they refuse."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")
ase = pytest.importorskip("ase")
pytest.importorskip("lightning")

from ase.build import molecule  # noqa: E402
from ase.calculators.calculator import PropertyNotImplementedError  # noqa: E402
from ase.calculators.fd import calculate_numerical_forces  # noqa: E402
from ase.md.verlet import VelocityVerlet  # noqa: E402
from ase.optimize import BFGS  # noqa: E402
from ase.units import fs, kB  # noqa: E402

from attnpool_kernels.zoo.calculator import PooledCalculator  # noqa: E402
from attnpool_kernels.zoo.model import PooledModel  # noqa: E402
from attnpool_kernels.zoo.molecules import Molecules  # noqa: E402

CUTOFF = 3.0  # Å; less than ethanol is long
CONFIG = {
    "backbone": "schnet",
    "backbone_options": {
        "hidden_channels": 16,
        "num_filters": 16,
        "num_interactions": 2,
        "num_gaussians": 12,
        "cutoff": CUTOFF,
    },
    "pooling": "abp",
    "pooling_options": {"hidden": 16, "heads": 2, "seeds": 2, "activation": "silu"},
}


def model(seed=0, **changes):
    """Random weights, scaled so that the forces on ethanol are of the size of a molecule's."""
    torch.manual_seed(seed)
    made = PooledModel.from_config(CONFIG | changes).double()
    if made.targets == 1:
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.1, seed=1)
        _, forces = made.energy_and_forces(Molecules.from_ase([atoms]))
        one = torch.ones(1, dtype=torch.float64)
        made.set_statistics(-4210.0 * one, one / forces.detach().square().mean().sqrt())
    return made


def ethanol(calculator):
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=2)
    atoms.calc = calculator
    return atoms


def test_forces_are_finite_differences_of_the_energy():
    atoms = ethanol(PooledCalculator(model()))
    wanted = calculate_numerical_forces(atoms, eps=1e-4)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(atoms.get_forces(), wanted, atol=1e-6)  # differences err by eps²


def test_numbers_are_those_of_the_model():
    made = model()
    atoms = ethanol(PooledCalculator(made))
    energy, forces = made.energy_and_forces(Molecules.from_ase([atoms]))
    assert atoms.get_potential_energy() == pytest.approx(energy.item(), abs=1e-10)
    np.testing.assert_allclose(atoms.get_forces(), forces.detach().numpy(), atol=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    # Only the energy was asked, then only the forces: the same numbers, kept until atoms move.
    assert atoms.calc.results.keys() == {"energy", "free_energy", "forces"}
    before = atoms.get_potential_energy()
    atoms.positions[0, 0] += 0.01
    assert atoms.get_potential_energy() != before


def fluctuation(calculator, step_fs, duration_fs=30.0):
    """Largest deviation of the total energy from its first value, and range of the kinetic."""
    atoms = ethanol(calculator)
    normal = np.random.default_rng(0).standard_normal(atoms.positions.shape)
    atoms.set_momenta(normal * np.sqrt(kB * 500 * atoms.get_masses()[:, None]))
    total, kinetic, neighbours = [], [], set()
    for _ in VelocityVerlet(atoms, step_fs * fs).irun(round(duration_fs / step_fs)):
        kinetic.append(atoms.get_kinetic_energy())
        total.append(kinetic[-1] + atoms.get_potential_energy())
        neighbours.add(int((atoms.get_all_distances() < CUTOFF).sum()))
    assert len(neighbours) > 1  # atoms crossed the cutoff
    return np.abs(np.array(total) - total[0]).max(), np.ptp(kinetic)


def test_dynamics_conserve_energy():
    """The error of velocity Verlet in a smooth potential is of second order in the time step."""
    calculator = PooledCalculator(model())
    coarse, kinetic = fluctuation(calculator, 0.5)
    fine, _ = fluctuation(calculator, 0.25)
    assert kinetic > 0.1  # energy was exchanged
    assert coarse < 0.02 * kinetic
    assert 3.7 < coarse / fine < 4.3


def test_wrong_forces_do_not_conserve_energy():
    """The bound above is not one that anything passes."""

    class Wrong(PooledCalculator):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            if "forces" in self.results:
                self.results["forces"] = 0.9 * self.results["forces"]

    coarse, kinetic = fluctuation(Wrong(model()), 0.5)
    assert coarse > 0.04 * kinetic


def test_float32_model_in_float64_places():
    """A float32 model keeps the digits of a total energy, and differs by its rounding only."""
    made = model()
    narrow = ethanol(PooledCalculator(made, dtype=torch.float32))
    wide = ethanol(PooledCalculator(made))
    assert next(narrow.calc.model.parameters()).dtype == torch.float32
    forces = wide.get_forces()
    np.testing.assert_allclose(narrow.get_forces(), forces, atol=1e-4 * np.abs(forces).max())
    error = narrow.get_potential_energy() - wide.get_potential_energy()
    # The rounding is the network's alone: the same without the thousands of eV that are added.
    alone = copy.deepcopy(made)
    alone.mean.zero_()
    others = [ethanol(PooledCalculator(alone, dtype=x)) for x in (torch.float32, torch.float64)]
    energies = [atoms.get_potential_energy() for atoms in others]
    assert error == pytest.approx(energies[0] - energies[1], abs=1e-11)
    assert abs(error) < 1e-4 * max(1.0, abs(energies[1]))
    assert made.std.dtype == torch.float64 and made.training
    assert next(made.parameters()).requires_grad  # the model given is left alone


def test_dropout_is_off():
    options = CONFIG["pooling_options"] | {"dropout": 0.5}
    calculator = PooledCalculator(model(pooling_options=options))
    first, again = (ethanol(calculator).get_potential_energy() for _ in range(2))
    assert first == again


def test_optimiser_lowers_the_energy():
    atoms = ethanol(PooledCalculator(model()))
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=20)
    assert atoms.get_potential_energy() < before - 0.01


def test_single_atom_has_no_force():
    atoms = ase.Atoms("C", [[0.0, 0.0, 0.0]])
    atoms.calc = PooledCalculator(model())
    assert np.isfinite(atoms.get_potential_energy())
    np.testing.assert_array_equal(atoms.get_forces(), np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms(), "at least one atom"),
        (ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=[5, 5, 5], pbc=[0, 0, 1]), "periodic"),
        (ase.Atoms("HF", [[0, 0, 0], [0, 0, 0.9]]), "got F"),
        (ase.Atoms("H2", [[0, 0, 0], [0, 0, 0]]), "one place an atom"),
        (ase.Atoms("H2", [[0, 0, 0], [0, 0, np.nan]]), "finite"),
    ],
)
def test_refused_atoms(atoms, message):
    atoms.calc = PooledCalculator(model(), elements=[1, 6, 8])
    with pytest.raises(ValueError, match=message):
        atoms.get_forces()
    with pytest.raises(ValueError, match=message):
        atoms.get_potential_energy()


def test_unknown_element_without_a_list():
    atoms = ase.Atoms("X", [[0, 0, 0]])
    atoms.calc = PooledCalculator(model())
    with pytest.raises(ValueError, match=r"H to Es.* got X"):
        atoms.get_potential_energy()


def test_refused_properties():
    atoms = ethanol(PooledCalculator(model()))
    with pytest.raises(PropertyNotImplementedError, match="not a sum over atoms"):
        atoms.get_potential_energies()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def water():
    return molecule("H2O")


def fresh(atoms, made):
    """Energy and forces of the model itself, which remembers nothing."""
    energy, forces = made.energy_and_forces(Molecules.from_ase([atoms]), create_graph=False)
    return energy.item(), forces.numpy()


def asks(atoms, name):
    return getattr(atoms, {"energy": "get_potential_energy", "forces": "get_forces"}[name])()


@pytest.mark.parametrize("first", [["energy", "forces"], ["forces"], ["energy"], None])
@pytest.mark.parametrize("second", [["energy"], ["free_energy"], ["energy", "forces"], None, []])
@pytest.mark.parametrize("change", ["other atoms", "moved", "moved in place", "none"])
def test_nothing_is_left_of_the_molecule_before(first, second, change):
    """Every order of direct calls and of questions, against calculators of their own."""
    made, a = model(), water()
    b = {"other atoms": molecule("CO"), "moved": a.copy()}.get(change, a)
    calculator = PooledCalculator(made)
    a.calc = b.calc = calculator
    calculator.calculate(a, first)
    held, kept = calculator.results, dict(calculator.results)
    if change.startswith("moved"):
        b.positions[0] += 0.2
    calculator.calculate(b, second, system_changes=[])  # what callers say is not relied on
    assert {"energy", "free_energy"} <= calculator.results.keys()
    energy, forces = fresh(b, made)
    for name, value in calculator.results.items():
        np.testing.assert_allclose(value, forces if name == "forces" else energy, atol=1e-10)
    assert "forces" in calculator.results or "forces" not in (
        ["forces"] if second is None else second
    )
    np.testing.assert_allclose(b.get_forces(), forces, atol=1e-12)
    assert b.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    assert held.keys() == kept.keys()  # who held the results before, holds them still
    energy, forces = fresh(a, made)
    assert a.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(a.get_forces(), forces, atol=1e-12)


@pytest.mark.parametrize("ask", ["energy", "forces"])
def test_nothing_is_left_after_a_failure(ask):
    """A molecule that was refused has no results, not those of the one before."""
    made, a = model(), water()
    calculator = PooledCalculator(made, elements=[1, 6, 8])
    for b in (
        ase.Atoms("HF", [[0, 0, 0], [0, 0, 0.9]]),
        ase.Atoms("OH2", a.positions, cell=[9, 9, 9], pbc=True),
        ase.Atoms("OH2", np.zeros((3, 3))),
        ase.Atoms(),
    ):
        a.calc = b.calc = calculator
        calculator.calculate(a, ["energy", "forces"])
        for _ in range(2):  # the second time from what the first has left
            with pytest.raises(ValueError):
                calculator.calculate(b, [ask])
            with pytest.raises(ValueError):
                asks(b, ask)
            assert calculator.results == {}
        np.testing.assert_allclose(a.get_forces(), fresh(a, made)[1], atol=1e-12)


def test_results_are_kept_for_the_same_atoms_only():
    calculator, a = PooledCalculator(model()), water()
    calculator.calculate(a, ["forces"])
    forces = calculator.results["forces"]
    calculator.calculate(a.copy(), ["energy"])
    assert calculator.results["forces"] is forces
    calculator.calculate(None, ["energy"])  # of the atoms before
    assert "forces" not in calculator.results or calculator.results["forces"] is forces
    a.calc = calculator
    a.get_forces()[:] = 7.0  # what is handed out is a copy
    assert abs(a.get_forces()).max() < 7.0
    assert calculator.calculation_required(molecule("CO"), ["energy"])
    assert not calculator.calculation_required(a, ["energy", "forces"])
    assert calculator.get_property("forces", molecule("CO"), allow_calculation=False) is None


def test_properties_by_name():
    calculator = PooledCalculator(model())
    calculator.calculate(water(), None)
    assert calculator.results.keys() == {"energy", "free_energy", "forces"}
    with pytest.raises(TypeError, match="properties must be a list of names, got 'forces'"):
        calculator.calculate(water(), "forces")
    with pytest.raises(PropertyNotImplementedError, match="energy, free_energy, forces, got 'str"):
        calculator.calculate(water(), ["energy", "stress"])
    with pytest.raises(ValueError, match="atoms must be given in the first call"):
        PooledCalculator(model()).calculate()


def test_charge_and_spin_are_said_once(recwarn):
    atoms = water()
    atoms.info["charge"] = 1
    atoms.calc = PooledCalculator(model())
    for i in range(3):
        atoms.positions[0] += 0.01
        assert atoms.get_potential_energy() and len(atoms.get_forces()) == 3
        assert [str(w.message) for w in recwarn if "charge=1" in str(w.message)] == [
            "H2O states charge=1, which is not used: the models know elements and positions only"
        ], i
    recwarn.clear()
    atoms.set_initial_magnetic_moments([2, 0, 0])
    atoms.get_forces()
    [said] = [w for w in recwarn if w.category is UserWarning]
    assert "charge=1, initial magnetic moments of 2 in all" in str(said.message)
    recwarn.clear()
    neutral = water()
    neutral.info.update(charge=0, multiplicity=1)
    neutral.calc = PooledCalculator(model())
    neutral.get_forces()
    assert not [w for w in recwarn if w.category is UserWarning]


def test_options_that_are_none():
    with pytest.raises(TypeError, match="no option 'charge'; the models know elements"):
        PooledCalculator(model(), charge=1)
    with pytest.raises(TypeError, match="no option 'spin'"):
        PooledCalculator(model()).set(spin=1)
    atoms = water()
    assert PooledCalculator(model(), label="a/b", atoms=atoms).label == "a/b" and atoms.calc


def trained(tmp_path, **changes):
    """The folder of a run on a file of MD17's format, and its task."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from attnpool_kernels.zoo.task import MoleculeData, PoolingTask

    rng = np.random.default_rng(0)
    atoms = molecule("CH3CH2OH")
    places = atoms.positions + 0.05 * rng.standard_normal((12, 9, 3))
    np.savez(
        tmp_path / "frames.npz",
        z=atoms.numbers,
        R=places,
        E=-97000 + rng.standard_normal(12),
        F=20 * rng.standard_normal(places.shape),
    )
    data = MoleculeData(
        "md17", str(tmp_path / "frames.npz"), options={"train": 8, "val": 2}, batch_size=4
    )
    keys = ("backbone", "backbone_options", "pooling", "pooling_options")
    task = PoolingTask(
        **{key: CONFIG[key] for key in keys}, targets=["energy"], forces=True, loss="mse"
    )
    keep = ModelCheckpoint(tmp_path / "run", "best", monitor="val/loss")
    trainer = Trainer(
        max_epochs=1,
        callbacks=[keep],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        **changes,
    )
    trainer.fit(task, data)
    return tmp_path / "run", task


def test_checkpoint_of_a_training_on_forces(tmp_path):
    folder, task = trained(tmp_path)
    atoms = ethanol(PooledCalculator(folder))
    energy, forces = task.model.eval().energy_and_forces(Molecules.from_ase([atoms]))
    assert atoms.get_potential_energy() == pytest.approx(energy.item(), abs=1e-6)
    assert -4300 < energy.item() < -4100  # -97000 kcal/mol are -4206 eV
    np.testing.assert_allclose(atoms.get_forces(), forces.numpy(), atol=1e-6)
    other = ase.Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])
    other.calc = PooledCalculator(folder / "best.ckpt")
    with pytest.raises(ValueError, match=r"knows \(H, C, O\), got N"):
        other.get_potential_energy()
    found = torch.load(folder / "best.ckpt", weights_only=True)
    found["zoo"]["targets"] = [["energy", "kcal/mol"]]
    torch.save(found, folder / "best.ckpt")
    with pytest.raises(ValueError, match="got energy in 'kcal/mol'"):
        PooledCalculator(folder)


def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match="one target, the energy, got 2"):
        PooledCalculator(model(targets=2))
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        PooledCalculator(model(), dtype=torch.float16)
    with pytest.raises(TypeError, match="got Linear"):
        PooledCalculator(torch.nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError):
        PooledCalculator(tmp_path / "none.ckpt")
