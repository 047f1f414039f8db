"""Every seed that a test uses, moved by one option: ``pytest --seed-shift 3``.

A tolerance that holds for one draw only is found by other draws. ``install`` moves the seeds where
they are taken (torch.manual_seed, torch.Generator, numpy's default_rng), so that no test can forget
to; ``numpy.random.RandomState`` stays, since published splits are defined by its seeds. The shift
is in the environment, so that a test's own processes that run pytest have it too.
"""

from __future__ import annotations

import os

import torch

VARIABLE = "ATTNPOOL_SEED_SHIFT"


def shift() -> int:
    return int(os.environ.get(VARIABLE) or 0)


class Generator(torch.Generator):
    """torch.Generator with moved seeds."""

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed((int(seed) + shift()) % 2**63)
        return self


def install(patch) -> None:
    """Moves the seeds; patch: a pytest.MonkeyPatch."""
    seed_torch = torch.manual_seed
    patch.setattr(torch, "manual_seed", lambda seed: seed_torch((int(seed) + shift()) % 2**63))
    patch.setattr(torch, "Generator", Generator)
    try:
        import numpy as np
    except ImportError:
        return
    seed_numpy = np.random.default_rng

    def default_rng(seed=None):
        return seed_numpy(seed + shift() if isinstance(seed, int) else seed)

    patch.setattr(np.random, "default_rng", default_rng)
