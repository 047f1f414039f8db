"""A few real molecules, to be written in the formats of the sources by the formats' own writers."""

import numpy as np
from ase.build import molecule

NAMES = (
    "CH4",
    "NH3",
    "H2O",
    "C2H2",
    "HCN",
    "H2CO",
    "CH3OH",
    "C2H6",
    "C2H4",
    "CH3CHO",
    "CO2",
    "H2",
    "C6H6",
    "N2H4",
    "CH3CN",
    "HCOOH",
    "C2H6NH",
    "H",
)


def molecules(count=18):
    """ASE atoms with 4-decimal positions, as SDF has them; the 18th is one atom of hydrogen."""
    found = [molecule(NAMES[i % len(NAMES)]) for i in range(count)]
    for i, atoms in enumerate(found):
        atoms.positions = np.round(atoms.positions + 0.01 * i, 4)
    return found


def same_structures(found, wanted, rtol=0.0):
    """Whether ``Molecules`` are the ASE atoms, in that order."""
    assert len(found) == len(wanted)
    assert np.array_equal(found.z, np.concatenate([a.numbers for a in wanted]))
    assert np.array_equal(found.ptr, np.cumsum([0] + [len(a) for a in wanted]))
    positions = np.concatenate([a.positions for a in wanted])
    assert np.allclose(found.pos, positions, rtol=rtol, atol=1e-12 if rtol == 0 else 1e-6)
    return True


def random_split(items, lengths, seed):
    """The indices that torch's own random_split gives."""
    import torch

    parts = torch.utils.data.random_split(
        items, lengths, generator=torch.Generator().manual_seed(seed)
    )
    return [list(part.indices) for part in parts]


def indices(split):
    return [part.tolist() for part in (split.train, split.val, split.test)]
