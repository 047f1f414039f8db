"""The registered operators: schemas, shapes without data, and the call into the chosen backend.

``torch.ops.attnpool.{attention, attention_backward, attention_double_backward}`` are the three
passes. ``autograd`` registers the derivative of each with the dispatcher. Their last argument names
a kernel backend, which is looked up here and nowhere else, so that a compiled graph or an exported
program holds the choice as a constant.

The names have changed once: caches of compilers on disk keep graphs of operators that had no
derivative of their own under the old names.
"""

from __future__ import annotations

import torch

from . import backends

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? q_ptr, Tensor k_ptr, Tensor? pair_ptr, "
    "Tensor? seed"
)
_RESULT = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
_OPTIONS = "float scale, float dropout"

library = torch.library.Library("attnpool", "DEF")
library.define(f"attention({_PROBLEM}, {_OPTIONS}, str backend) -> (Tensor, Tensor)")
library.define(
    f"attention_backward({_PROBLEM}, {_RESULT}, {_OPTIONS}, bool need_dbias, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"attention_double_backward({_PROBLEM}, {_RESULT}, Tensor? ddq, Tensor? ddk, Tensor? ddv, "
    f"Tensor? ddbias, {_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout, backend):
    return backends.load(backend).forward(
        q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout
    )


def _backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, scale, dropout, need_dbias,
    backend,
):  # fmt: skip
    return backends.load(backend).backward(
        q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, scale, dropout,
        need_dbias,
    )  # fmt: skip


def _double_backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, ddq, ddk, ddv, ddbias,
    scale, dropout, backend,
):  # fmt: skip
    return backends.load(backend).double_backward(
        q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, ddq, ddk, ddv, ddbias,
        scale, dropout,
    )  # fmt: skip


def _fake_forward(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout, backend):
    rows = q.shape[:1] if q_ptr is not None else (k_ptr.shape[0] - 1, q.shape[0])
    heads = q.shape[1]
    out = q.new_empty((*rows, heads, v.shape[2]))
    lse = q.new_empty((*rows, heads), dtype=accumulator(q.dtype))
    return out, lse


def _fake_bias(q, bias, wanted):
    if bias is None:
        return q.new_empty((0, q.shape[1]))
    return bias.new_empty(bias.shape if wanted else (0, bias.shape[1]))


def _fake_backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, scale, dropout, need_dbias,
    backend,
):  # fmt: skip
    dbias = _fake_bias(q, bias, need_dbias)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _fake_double_backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, ddq, ddk, ddv, ddbias,
    scale, dropout, backend,
):  # fmt: skip
    gbias = _fake_bias(q, bias, True)
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    return *gradients, gbias, out.new_empty(out.shape), lse.new_empty(lse.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, softmax and LSE: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


for _name, _run, _fake in (
    ("attention", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
    ("attention_double_backward", _double_backward, _fake_double_backward),
):
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _run, _key)
    torch.library.register_fake(f"attnpool::{_name}", _fake, lib=library)

forward = torch.ops.attnpool.attention.default
backward = torch.ops.attnpool.attention_backward.default
double_backward = torch.ops.attnpool.attention_double_backward.default
