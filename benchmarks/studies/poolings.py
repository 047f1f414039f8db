"""Poolings of a whole model: of this package, and padded as programs before it have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_geometric.nn
from torch import Tensor
from torch.nn.functional import linear
from torch_geometric.utils import to_dense_batch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling, SumPooling
from attnpool_kernels.zoo.pyg import SetTransformerAggregation

LONGEST = 23  # atoms of the largest molecule of QM7b, to which the original programs pad


@dataclass(frozen=True)
class Size:
    """SchNet of ``width`` and ``interactions``; pooling of ``hidden``: 2 SABs, PMA, a SAB."""

    width: int
    interactions: int
    hidden: int
    heads: int
    seeds: int

    def __str__(self) -> str:
        return (
            f"SchNet {self.width}x{self.interactions} ABP {self.hidden}/{self.heads}/{self.seeds}"
        )


SIZES = {
    "small": Size(128, 3, 256, 8, 32),
    "published": Size(256, 8, 1024, 16, 32),  # Buterez et al. 2023, QM7b
    "tiny": Size(16, 2, 32, 4, 4),
}


class PaddedABP(AttentionPooling):
    """ABP as programs without ragged kernels compute it: bmm and softmax on a padded batch.

    pad_to: as in the programs of Buterez et al., all molecules padded to that many atoms and
    nothing masked (the numbers are those of ``phantom=pad_to``); None: to the longest of the batch,
    padded keys masked (the numbers of ``phantom=None``). As there, three separate projections,
    seeds repeated for each molecule, and the last linear layer on every seed.
    """

    def __init__(self, *arguments, pad_to: int | None = None, **options) -> None:
        super().__init__(*arguments, **options)
        self.pad_to = pad_to

    def forward(self, x: Tensor, ptr: Ragged) -> Tensor:
        count = len(ptr)
        batch = ptr.batch(x.shape[0])
        x, real = to_dense_batch(x, batch, max_num_nodes=self.pad_to, batch_size=count)
        keys = None if self.pad_to else real[:, None, None]
        for block in self.encoders:
            x = dense_mab(block.mab, x, x, keys)
        x = dense_mab(self.pma.mab, self.pma.seed.repeat(count, 1, 1), x, keys)
        for block in self.decoders:
            x = dense_mab(block.mab, x, x, None)
        return self.head(x).mean(1)


def dense_mab(block: torch.nn.Module, x: Tensor, y: Tensor, keys: Tensor | None) -> Tensor:
    """MAB of the original form on x [B, n, C], y [B, m, C']; keys: [B, 1, 1, m], False: masked."""
    a = block.attn
    weights, biases = a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3)
    parts = [linear(z, w, b) for z, w, b in zip((x, y, y), weights, biases)]
    q, k, v = (z.unflatten(2, (a.heads, -1)).transpose(1, 2) for z in parts)
    logits = q @ k.transpose(2, 3) * a.dim**-0.5
    if keys is not None:
        logits = logits.masked_fill(~keys, -torch.inf)
    h = (q + logits.softmax(3) @ v).transpose(1, 2).flatten(2)
    return h + linear(h, block.lin.weight, block.lin.bias).relu()


class Aggregated(torch.nn.Module):
    """Linear, a Set Transformer aggregation of ``source``, Linear: C → D → C, mean over the seeds.

    PyG's aggregation has one width throughout, so the linear layers make room for D.
    """

    def __init__(self, size: Size, source: type) -> None:
        super().__init__()
        self.first = torch.nn.Linear(size.width, size.hidden)
        self.aggregation = source(
            size.hidden, size.seeds, num_encoder_blocks=2, heads=size.heads, concat=False
        )
        self.last = torch.nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor, ptr: Ragged) -> Tensor:
        return self.last(self.aggregation(self.first(x), ptr.batch(x.shape[0]), dim_size=len(ptr)))


def _abp(cls: type = AttentionPooling, **options) -> Callable[[Size], torch.nn.Module]:
    return lambda size: cls(size.width, size.hidden, heads=size.heads, seeds=size.seeds, **options)


def _pyg(source: type) -> Callable[[Size], torch.nn.Module]:
    return lambda size: Aggregated(size, source)


@dataclass(frozen=True)
class PoolingContender:
    """like: another implementation with the same parameters and numbers."""

    name: str
    title: str
    pool: Callable[[Size], torch.nn.Module]
    like: Callable[[Size], torch.nn.Module] | None
    layout: str
    ours: bool
    steps: tuple[str, ...]


STEPS = ("energy", "force")
_THEIRS = torch_geometric.nn.SetTransformerAggregation
CONTENDERS = {
    contender.name: contender
    for contender in (
        PoolingContender("sum", "sum", lambda size: SumPooling(), None, "ragged", False, STEPS),
        PoolingContender("abp", "ABP, attnpool", _abp(), _abp(PaddedABP), "ragged", True, STEPS),
        PoolingContender(
            "abp_masked",
            "ABP, padded to the batch, masked",
            _abp(PaddedABP),
            _abp(),
            "padded",
            False,
            ("force",),
        ),
        PoolingContender(
            "abp_original",
            f"ABP, padded to {LONGEST} as the original",
            _abp(PaddedABP, pad_to=LONGEST),
            _abp(phantom=LONGEST),
            "padded",
            False,
            ("energy",),
        ),
        PoolingContender(
            "abp_reference",
            'ABP, attnpool, backend="reference"',
            _abp(backend="reference"),
            _abp(PaddedABP),
            "ragged",
            False,
            ("force",),
        ),
        PoolingContender(
            "st",
            "Set Transformer, attnpool.zoo.pyg",
            _pyg(SetTransformerAggregation),
            _pyg(_THEIRS),
            "ragged",
            True,
            ("energy",),
        ),
        PoolingContender(
            "st_pyg",
            "Set Transformer, PyG (padded)",
            _pyg(_THEIRS),
            _pyg(SetTransformerAggregation),
            "padded",
            False,
            ("energy",),
        ),
    )
}
