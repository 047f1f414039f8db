"""PET of metatrain learns forces through set attention.

Run: python examples/pet_metatrain.py
Needs metatrain and ase: pip install metatrain==2026.4.1. Molecules are shaken; their forces are
those of ASE's effective medium theory.
"""

import warnings

import torch

from attnpool_kernels.integrations.metatrain import use_attnpool

try:
    import ase.build
    from ase.calculators.emt import EMT
    from metatomic.torch import systems_to_torch
    from metatrain.pet import PET
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info
    from metatrain.utils.evaluate_model import evaluate_model
    from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists
except ImportError as error:
    # metatrain brings the others.
    missing = "ase" if (error.name or "").split(".")[0] == "ase" else "metatrain"
    raise SystemExit(f"this needs {missing}: pip install metatrain==2026.4.1") from None

warnings.filterwarnings("ignore", message="This system's positions or cell")
SMALL = {"d_pet": 32, "d_node": 32, "d_head": 32, "d_feedforward": 32, "num_heads": 4}
ENERGY = get_energy_target_info("energy", {"quantity": "energy", "unit": "eV"}, True)


def model() -> PET:
    hypers = get_default_hypers("pet")["model"] | SMALL
    info = DatasetInfo("angstrom", atomic_types=[1, 6, 8], targets={"energy": ENERGY})
    # The line to change: it was PET(hypers, info).
    return use_attnpool(PET(hypers, info))


def batch(net: PET, size: int, seed: int):
    """Systems with their neighbours, and forces [N, 3] in eV/Å."""
    systems, forces = [], []
    for i in range(size):
        atoms = ase.build.molecule(("CH4", "H2O", "CH3OH", "C2H6")[i % 4])
        atoms.rattle(0.1, seed=size * seed + i)
        atoms.calc = EMT()
        forces.append(torch.tensor(atoms.get_forces(), dtype=torch.float32))
        system = systems_to_torch(atoms, dtype=torch.float32)
        systems.append(get_system_with_neighbor_lists(system, net.requested_neighbor_lists()))
    return systems, torch.cat(forces)


def main(steps: int = 60, size: int = 8) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    net = model().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        systems, target = batch(net, size, step)
        out = evaluate_model(net, systems, {"energy": ENERGY}, is_training=True)
        forces = -out["energy"].block().gradient("positions").values.squeeze(-1)
        loss = (forces - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
