"""A whole pooling module: the Set Transformer aggregation as PyG defines it.

One self-attention block over atoms, pooling by S seeds, one self-attention block over the seeds;
without layer norm::

    MAB(x, y) = h + relu(lin(h)),  h = x + MHA(x, y, y)
    out = SAB(MAB(seeds, relu(lin(SAB(x)))))        x [N, C] -> [B, S·C]

Everyone gets the same 21 weights, in the order of PyG's parameters. Sources: Lee et al. 2019;
torch_geometric.nn.SetTransformerAggregation (dimensions and names).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from .workload import Workload

_MAB = (
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "lin.weight",
    "lin.bias",
)
NAMES = (
    *[f"encoders.0.mab.{name}" for name in _MAB],
    "pma.lin.weight",
    "pma.lin.bias",
    "pma.seed",
    *[f"pma.mab.{name}" for name in _MAB],
    *[f"decoders.0.mab.{name}" for name in _MAB],
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw_weights(work: Workload, normal: Callable[..., Tensor]) -> list[Tensor]:
    """The weights of one module in the order of ``NAMES``, from ``normal(*shape)``."""
    width = work.heads * work.dim

    def draw(name: str) -> Tensor:
        if name.endswith("seed"):
            return normal(1, work.seeds or 1, width)
        rows = 3 * width if "in_proj" in name else width
        return normal(rows, width) * width**-0.5 if name.endswith("weight") else normal(rows) * 0.1

    return [draw(name) for name in NAMES]


def mab(x: Tensor, y: Tensor, weights: list[Tensor], heads: int, attend: Attend) -> Tensor:
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


def ragged(
    work: Workload, x: Tensor, weights: list[Tensor], attend: Attend, pool: Attend
) -> Tensor:
    """The module on packed atoms; ``pool`` takes seeds [S, H, D] and gives [B, S, H, D]."""
    heads, molecules = work.heads, len(work.sizes)
    x = mab(x, x, weights[:6], heads, attend)
    y = relu(linear(x, *weights[6:8]))
    pooled = mab(weights[8][0], y, weights[9:15], heads, pool)  # [B, S, C]
    return mab(pooled, pooled, weights[15:], heads, few_seeds).reshape(molecules, -1)


def few_seeds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention over the few seeds of each molecule, [B, S, H, D]."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(3), v)
