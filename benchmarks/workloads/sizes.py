"""How many atoms the molecules of a batch have, drawn alike on every machine.

Sizes count atoms with hydrogens. The histograms of QM7b (Montavon et al. 2013; 7,211 molecules) and
QM8 (21,786 molecules) are counts over the whole data sets. QM9-like and QMugs-like are *assumed*
normal shapes around the published mean, cut at the published maximum: no histogram was at hand.
"""

from __future__ import annotations

import random

HISTOGRAMS = {  # atoms per molecule: molecules
    "QM7b": {
        4: 1, 5: 2, 6: 5, 7: 7, 8: 21, 9: 64, 10: 147, 11: 269, 12: 495, 13: 777, 14: 767,
        15: 1219, 16: 786, 17: 1084, 18: 592, 19: 539, 20: 264, 21: 124, 22: 39, 23: 9,
    },
    "QM8": {
        3: 2, 4: 4, 5: 5, 6: 12, 7: 20, 8: 63, 9: 152, 10: 362, 11: 623, 12: 1069, 13: 1705,
        14: 2292, 15: 2701, 16: 3113, 17: 2716, 18: 2806, 19: 1311, 20: 1721, 21: 265, 22: 648,
        23: 33, 24: 145, 26: 18,
    },
}  # fmt: skip
NORMALS = {  # mean, standard deviation, smallest, largest: assumed shapes
    "QM9-like": (18.0, 3.0, 3, 29),
    "QMugs-like": (55.0, 35.0, 4, 228),
    "n=55+-20": (55.0, 20.0, 4, 228),
}
UNIFORM = {
    "neighbours": (20, 60),  # rows of an atom and its neighbours inside 4.5 to 6 Å
    "10-20 atoms": (10, 20),
    "40-80 atoms": (40, 80),
}
DISTRIBUTIONS = (*HISTOGRAMS, *NORMALS, *UNIFORM)


def draw(distribution: str, molecules: int, seed: int = 0) -> tuple[int, ...]:
    """Sizes of a batch of molecules; the same on every machine and Python version."""
    rng = random.Random(f"{distribution} {seed}")
    if distribution in HISTOGRAMS:
        histogram = HISTOGRAMS[distribution]
        return tuple(rng.choices(list(histogram), list(histogram.values()), k=molecules))
    if distribution in UNIFORM:
        return tuple(rng.randint(*UNIFORM[distribution]) for _ in range(molecules))
    mean, deviation, smallest, largest = NORMALS[distribution]
    sizes: list[int] = []
    while len(sizes) < molecules:
        size = round(rng.gauss(mean, deviation))
        if smallest <= size <= largest:
            sizes.append(size)
    return tuple(sizes)
