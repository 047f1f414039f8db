"""The whole pooling module: on this package, as PyG has it, and padded in plain torch."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, multi_head_attention_forward, relu

import attnpool_kernels

from ..workloads import set_transformer
from ..workloads.batch import WorkloadBatch
from ..workloads.set_transformer import few_seeds
from ..workloads.workload import Workload
from .contender import Call, Contender, Kernel, Reasons, fits, torch_kernel
from .packages import installed, version
from .padding import Padding


def ours(batch: WorkloadBatch) -> Call:
    """Packed rows all the way, with the automatic choice of backend."""
    molecules = attnpool_kernels.Ragged.from_ptr(batch.ptr)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnpool_kernels.set_attention(q, k, v, molecules)

    def pool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnpool_kernels.seed_pool(q, k, v, molecules)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return set_transformer.ragged(batch.workload, x, list(weights), attend, pool)

    return call


def padded(batch: WorkloadBatch, fused: bool) -> Call:
    """On the padded batch: torch's multi-head attention (fused), or matmul and softmax."""
    work, pad = batch.workload, Padding(batch.workload.sizes, batch.device)
    bias = pad.bias(work.dtype)

    def mab(x: Tensor, y: Tensor, weights: list[Tensor], masked: bool) -> Tensor:
        if not fused:
            return set_transformer.mab(x, y, weights, work.heads, plain if masked else few_seeds)
        w_in, b_in, w_out, b_out, w_lin, b_lin = weights
        mask = ~pad.real if masked and not pad.full else None
        x_first, y_first = x.transpose(0, 1), y.transpose(0, 1)
        h, _ = multi_head_attention_forward(
            x_first,
            y_first,
            y_first,
            x.shape[-1],
            work.heads,
            in_proj_weight=w_in,
            in_proj_bias=b_in,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=w_out,
            out_proj_bias=b_out,
            key_padding_mask=mask,
            need_weights=False,
        )
        h = x + h.transpose(0, 1)
        return h + relu(linear(h, w_lin, b_lin))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * work.dim**-0.5
        if bias is not None:
            logits = logits + bias
        return torch.einsum("bhij,bjhd->bihd", logits.softmax(3), v)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        w = list(weights)
        x = pad.pad(x)
        x = mab(x, x, w[:6], True)
        y = relu(linear(x, *w[6:8]))
        pooled = mab(w[8].expand(len(work.sizes), -1, -1), y, w[9:15], True)
        return mab(pooled, pooled, w[15:], False).flatten(1)

    return call


def pyg(batch: WorkloadBatch, source: str) -> Call:
    """PyG's module from ``source``, given the batch vector and the longest molecule."""
    made = importlib.import_module(source).SetTransformerAggregation
    work = batch.workload
    width, seeds = work.heads * work.dim, work.seeds or 1
    module = made(width, seeds, heads=work.heads).to(batch.device, work.dtype)
    index = attnpool_kernels.Ragged.from_ptr(batch.ptr).batch()
    size, longest = len(work.sizes), max(work.sizes)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(set_transformer.NAMES, weights))
        options = {"dim_size": size, "max_num_elements": longest}
        return torch.func.functional_call(module, named, (x, index), options)

    return call


def _pyg_fits(order: int) -> Reasons:
    def why_not(work: Workload, what: str, device: str) -> list[str]:
        if not installed("torch_geometric"):
            return ["torch_geometric is not installed"]
        return fits(order)(work, what, device)

    return why_not


def _named(text: str) -> Kernel:
    return lambda work, device: text


_OURS = f"attnpool_kernels {attnpool_kernels.__version__}, automatic choice of backend"
_PYG = f"torch_geometric {version('torch_geometric')} on torch {torch.__version__}"

CONTENDERS = (
    Contender("module", "module on attnpool", ours, fits(), _named(_OURS), True, True),
    Contender(
        "module_pyg",
        "drop-in for PyG's module, attnpool_kernels.zoo.pyg",
        partial(pyg, source="attnpool_kernels.zoo.pyg"),
        _pyg_fits(2),
        _named(f"{_OURS}; {_PYG}"),
        ours=True,
        module=True,
    ),
    Contender(
        "module_naive",
        "module, padded naive",
        partial(padded, fused=False),
        fits(),
        torch_kernel("einsum, softmax"),
        module=True,
    ),
    Contender(
        "module_mha",
        "module, torch MHA padded",
        partial(padded, fused=True),
        fits(1),
        torch_kernel("multi_head_attention_forward"),
        module=True,
    ),
    Contender(
        "pyg",
        "PyG SetTransformerAggregation",
        partial(pyg, source="torch_geometric.nn"),
        _pyg_fits(1),
        _named(_PYG),
        module=True,
    ),
)
