"""Stateless dropout on attention weights: the seed, and the keep mask in plain torch.

A weight is kept or dropped by the counter-based generator Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC'11) on (seed; molecule, head, query, key), all indices
counted inside the batch, the heads and the molecule. No state, no order, no tile enters, so every
backend and both backward passes rebuild the same mask. This file is the specification; its twins
csrc/philox.h and the Triton primitive repeat it bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def draw_seed(device: torch.device) -> Tensor:
    """An int64 tensor [1] from torch's generator of ``device``: ``torch.manual_seed`` fixes it.

    It stays on the device, so drawing neither synchronises nor breaks a CUDA graph.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout: float) -> int:
    """A random 32-bit word below this number drops its weight."""
    return int(dropout * 2.0**32)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> Tensor:
    """Philox4x32-10: four counter words and a 64-bit seed to four random words, stacked last.

    All tensors int64 with values below 2^32 (seed: any int64); shapes broadcast.
    """
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        # The 64-bit product wraps in int64, but both of its 32-bit halves are exact.
        first, second = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((second >> 32) & WORD) ^ x1 ^ key0,
            second & WORD,
            ((first >> 32) & WORD) ^ x3 ^ key1,
            first & WORD,
        )
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return torch.stack([x0, x1, x2, x3], -1)


def keep_mask(
    seed: Tensor, molecule: int | Tensor, heads: int, queries: int, keys: int, dropout: float
) -> Tensor:
    """Which weights of one molecule are kept: bool [heads, queries, keys]."""
    device = seed.device
    head = torch.arange(heads, device=device)[:, None, None]
    query = torch.arange(queries, device=device)[None, :, None]
    block = torch.arange((keys + 3) // 4, device=device)[None, None, :]
    index = torch.as_tensor(molecule, device=device).expand(1, 1, 1)
    words = philox((block, query, head, index), seed)  # four neighbouring keys share a counter
    return words.flatten(-2)[..., :keys] >= threshold(dropout)
