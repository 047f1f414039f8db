"""A whole pooling module as a contender: the Set Transformer aggregation as PyG defines it.

One self-attention block over atoms, pooling by S seeds, one self-attention block over the seeds;
without layer norm::

    MAB(x, y) = h + relu(lin(h)),  h = x + MHA(x, y, y)
    out = SAB(MAB(seeds, relu(lin(SAB(x)))))        x [N, C] -> [B, S·C]

All contenders get the same 21 weights, in the order of PyG's parameters. Sources: Lee et al. 2019;
torch_geometric.nn.SetTransformerAggregation (dimensions and names).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, multi_head_attention_forward, relu

import attnpool_kernels
from benchmarks.contenders.attention import Padding
from benchmarks.workloads.suites import Batch, Workload

_MAB = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
        "lin.weight", "lin.bias")  # fmt: skip
NAMES = (
    *[f"encoders.0.mab.{name}" for name in _MAB],
    "pma.lin.weight", "pma.lin.bias", "pma.seed",
    *[f"pma.mab.{name}" for name in _MAB],
    *[f"decoders.0.mab.{name}" for name in _MAB],
)  # fmt: skip

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw_weights(work: Workload, normal: Callable[..., Tensor]) -> list[Tensor]:
    width = work.heads * work.dim

    def draw(name: str) -> Tensor:
        if name.endswith("seed"):
            return normal(1, work.seeds or 1, width)
        rows = 3 * width if "in_proj" in name else width
        return normal(rows, width) * width**-0.5 if name.endswith("weight") else normal(rows) * 0.1

    return [draw(name) for name in NAMES]


def _mab(x: Tensor, y: Tensor, weights: list[Tensor], heads: int, attend: Attend) -> Tensor:
    """One block on rows [..., C]; ``attend`` takes [..., H, D]."""
    w_in, b_in, w_out, b_out, w_lin, b_lin = weights
    width = x.shape[-1]

    def split(z: Tensor, parts: int) -> tuple[Tensor, ...]:
        return z.unflatten(-1, (parts, heads, width // heads)).unbind(-3)

    if x is y:
        q, k, v = split(linear(x, w_in, b_in), 3)
    else:
        (q,) = split(linear(x, w_in[:width], b_in[:width]), 1)
        k, v = split(linear(y, w_in[width:], b_in[width:]), 2)
    h = x + linear(attend(q, k, v).flatten(-2), w_out, b_out)
    return h + relu(linear(h, w_lin, b_lin))


def _ragged(
    work: Workload, x: Tensor, weights: list[Tensor], attend: Attend, pool: Attend
) -> Tensor:
    """The module on packed atoms; ``pool`` takes seeds [S, H, D] and gives [B, S, H, D]."""
    heads, molecules = work.heads, len(work.sizes)
    x = _mab(x, x, weights[:6], heads, attend)
    y = relu(linear(x, *weights[6:8]))
    pooled = _mab(weights[8][0], y, weights[9:15], heads, pool)  # [B, S, C]
    return _mab(pooled, pooled, weights[15:], heads, _batched).reshape(molecules, -1)


def _batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention over the few seeds of each molecule, [B, S, H, D]."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(3), v)


def module64(work: Workload, x: Tensor, *weights: Tensor) -> Tensor:
    """The formula per molecule; the oracle when given float64."""
    from dataclasses import replace

    from benchmarks.measuring.gate import attention64

    atoms = replace(work, seeds=None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention64(atoms, q, k, v)

    def pool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention64(work, q, k, v)

    return _ragged(work, x, list(weights), attend, pool)


def ours(batch: Batch) -> Callable[..., Tensor]:
    """Packed rows all the way, with the automatic choice of backend."""
    molecules = attnpool_kernels.Ragged.from_ptr(batch.ptr)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnpool_kernels.set_attention(q, k, v, molecules)

    def pool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnpool_kernels.seed_pool(q, k, v, molecules)

    return lambda x, *weights: _ragged(batch.workload, x, list(weights), attend, pool)


def padded(batch: Batch, fused: bool) -> Callable[..., Tensor]:
    """On the padded batch: torch's multi-head attention (fused), or matmul and softmax."""
    work, pad = batch.workload, Padding(batch.workload.sizes, batch.device)
    bias = pad.bias(work.dtype)

    def mab(x: Tensor, y: Tensor, weights: list[Tensor], masked: bool) -> Tensor:
        if not fused:
            return _mab(x, y, weights, work.heads, plain if masked else _batched)
        w_in, b_in, w_out, b_out, w_lin, b_lin = weights
        mask = ~pad.real if masked and not pad.full else None
        x_first, y_first = x.transpose(0, 1), y.transpose(0, 1)
        h, _ = multi_head_attention_forward(
            x_first, y_first, y_first, x.shape[-1], work.heads, w_in, b_in, None, None, False, 0.0,
            w_out, b_out, key_padding_mask=mask, need_weights=False,
        )  # fmt: skip
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


def pyg(batch: Batch, source: str) -> Callable[..., Tensor]:
    """PyG's module from ``source``, given the batch vector and the longest molecule."""
    made = importlib.import_module(source).SetTransformerAggregation

    work = batch.workload
    width, seeds = work.heads * work.dim, work.seeds or 1
    module = made(width, seeds, heads=work.heads).to(batch.device, work.dtype)
    index = attnpool_kernels.Ragged.from_ptr(batch.ptr).batch()
    size, longest = len(work.sizes), max(work.sizes)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(NAMES, weights))
        options = {"dim_size": size, "max_num_elements": longest}
        return torch.func.functional_call(module, named, (x, index), options)

    return call


def _contenders():
    from benchmarks.contenders.registry import Contender, _fits, installed, version

    own, torch_version = attnpool_kernels.__version__, torch.__version__
    libraries = f"torch_geometric {version('torch_geometric')} on torch {torch_version}"

    def pyg_why_not(order: int) -> Callable[[Workload, str, str], list[str]]:
        def why_not(work: Workload, what: str, device: str) -> list[str]:
            if not installed("torch_geometric"):
                return ["torch_geometric is not installed"]
            return _fits(order)(work, what, device)

        return why_not

    def named(text: str) -> Callable[[Workload, str], str]:
        return lambda work, device: text

    automatic = f"attnpool_kernels {own}, automatic choice of backend"
    return (
        Contender("module", "module on attnpool", ours, _fits(), named(automatic), True, True),
        Contender("module_pyg", "drop-in for PyG's module, attnpool_kernels.zoo.pyg",
                  lambda batch: pyg(batch, "attnpool_kernels.zoo.pyg"), pyg_why_not(2),
                  named(f"{automatic}; {libraries}"), True, True),
        Contender("module_naive", "module, padded naive", lambda batch: padded(batch, False),
                  _fits(), named(f"torch {torch_version}: einsum, softmax"), False, True),
        Contender("module_mha", "module, torch MHA padded", lambda batch: padded(batch, True),
                  _fits(1), named(f"torch {torch_version}: multi_head_attention_forward"),
                  False, True),
        Contender("pyg", "PyG SetTransformerAggregation",
                  lambda batch: pyg(batch, "torch_geometric.nn"), pyg_why_not(1),
                  named(libraries), False, True),
    )  # fmt: skip


CONTENDERS = _contenders()
