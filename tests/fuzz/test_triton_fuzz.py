"""Triton's kernels in its interpreter, under the guard. Only where TRITON_INTERPRET=1 was set
before triton was imported, as ``fuzz.run`` does; small batches, since each program takes 10 ms."""

import os
from dataclasses import replace

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch
from hypothesis import strategies as st
from test_properties import DTYPES
from tools.drawn import drawn
from tools.interpreted import run

from attnpool_kernels import testing

COUNTS = st.sampled_from([0, 1, 2, 5, 15, 16, 17, 33, 40])
BIASES = st.sampled_from([None, None, "pair", "float32", "mask"])


@st.composite
def small_cases(draw):
    counts = tuple(draw(st.lists(COUNTS, min_size=1, max_size=3)))
    seeds = draw(st.sampled_from([None, None, 1, 3, 19]))
    other = seeds is None and draw(st.booleans())
    return testing.Case(
        "drawn",
        counts,
        q_counts=tuple(draw(COUNTS) for _ in counts) if other else None,
        heads=draw(st.sampled_from([1, 2])),
        dim=draw(st.sampled_from([1, 5, 8, 16, 24, 40])),
        value_dim=draw(st.sampled_from([None, 3, 20])),
        seeds=seeds,
        bias=draw(BIASES),
        key_bias=draw(BIASES),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
        nobody=draw(st.sampled_from([0, 2])),
        layout=draw(st.sampled_from(["contiguous", "fused", "transposed", "expanded", "offset"])),
        logits=draw(st.sampled_from([0.0, 1.0, 30.0])),
        index=draw(st.sampled_from([torch.int32, torch.int64])),
        lse=draw(st.booleans()),
    )


@drawn(3, case=small_cases(), dtype=DTYPES, order=st.integers(0, 99))
def test_interpreted(case, dtype, order):
    testing.judge(case, dtype, lambda batch: run(batch, order))


@drawn(3, case=small_cases(), values=st.lists(st.integers(-5, 60), min_size=3, max_size=3))
def test_interpreted_garbage(case, values):
    """Boundaries that lie give any numbers, but no access outside of the tensors."""
    batch = replace(case, bias=None, logits=1.0).make(torch.float32)
    lies = torch.tensor([0, *values], dtype=case.index)[: len(case.counts) + 1]
    batch.k_ptr[:] = lies
    run(batch, 1)
