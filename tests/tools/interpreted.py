"""What the tests of the interpreted Triton kernels share; imported where TRITON_INTERPRET=1 is set
before triton is imported, see test_triton.py."""

from __future__ import annotations

import torch

import attnpool_kernels.impl.triton as backend
from attnpool_kernels import testing
from attnpool_kernels.operands import Cotangents, Operands, Tangents

from .triton_guard import guard, padded

# 20 and 7: one block of queries, which the query kernel does alone; 41: two, and two of keys
MIXED = testing.Case(
    "mixed", (20, 0, 7, 41), heads=1, dim=16, bias="pair", key_bias="pair", lse=True
)


def with_red_zones(batch: testing.Batch) -> testing.Batch:
    names = (*Operands._fields, *Cotangents._fields, *Tangents._fields)
    for name in names:
        setattr(batch, name, padded(getattr(batch, name)))
    return batch


def run(batch: testing.Batch, seed: int | None = 1) -> dict[str, torch.Tensor]:
    """All three passes under the guard, with red zones around every input."""
    batch = with_red_zones(batch)
    with guard(seed):
        return testing.run_kernels(batch, backend)
