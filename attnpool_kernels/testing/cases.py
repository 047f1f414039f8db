"""Batches of molecules that together reach every branch of a backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dropout import draw_seed
from ..operands import Cotangents, Operands, Options, Tangents, accumulator


@dataclass(frozen=True)
class Case:
    """One batch of molecules: sizes, options and memory layout. ``make`` draws its tensors."""

    name: str
    counts: tuple[int, ...]  # keys per molecule
    heads: int = 2
    dim: int = 8
    value_dim: int | None = None  # None: dim
    q_counts: tuple[int, ...] | None = None  # queries per molecule; None: the keys
    seeds: int | None = None  # shared queries instead
    bias: str | None = None  # "pair": random, "mask": some -inf and a row of them, "float32"
    # "pair": random; "float32"; "mask": some -inf, and every key of the first molecule; "heads":
    # one number for all heads
    key_bias: str | None = None
    dropout: float = 0.0
    nobody: int = 0  # rows of no molecule, at the end
    layout: str = "contiguous"  # "fused", "transposed", "expanded", "offset"
    logits: float = 1.0  # size of the logits
    index: torch.dtype = torch.int64
    lse: bool = False  # lse has a cotangent too

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Batch:
        return _make(self, dtype, device, seed)


@dataclass
class Batch:
    """The tensors of a case: inputs, and one cotangent for each output of each pass."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_bias: Tensor | None
    q_ptr: Tensor | None
    k_ptr: Tensor
    pair_ptr: Tensor | None
    seed: Tensor | None
    scale: float
    dout: Tensor
    dlse: Tensor | None
    ddq: Tensor
    ddk: Tensor
    ddv: Tensor
    ddbias: Tensor | None
    ddkey_bias: Tensor | None

    @property
    def operands(self) -> Operands:
        return Operands(*(getattr(self, name) for name in Operands._fields))

    @property
    def options(self) -> Options:
        return Options(self.scale, self.case.dropout)

    @property
    def cotangents(self) -> Cotangents:
        return Cotangents(self.dout, self.dlse)

    @property
    def tangents(self) -> Tangents:
        return Tangents(self.ddq, self.ddk, self.ddv, self.ddbias, self.ddkey_bias)

    def inputs(self) -> dict[str, Tensor]:
        """What can have a gradient, by name."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "bias", "key_bias")}
        return {name: x for name, x in named.items() if x is not None}


CASES = (
    Case("molecules", (18, 23, 4, 15, 17)),
    Case("one atom", (1,), heads=1, dim=1),
    Case("no atoms", (0, 0), nobody=3),
    Case("no molecules", ()),
    Case("empty among them", (0, 3, 0, 16, 5, 0), heads=3, dim=32, nobody=2),
    Case("tile edges", (15, 16, 17, 31, 32, 33), dim=16),
    Case("longer", (63, 64, 65, 130), heads=1, dim=32),
    Case("odd width", (7, 12, 1), heads=3, dim=5, value_dim=7),
    Case("wide", (9, 20), heads=1, dim=80, value_dim=48),
    Case("widest", (3, 17), heads=1, dim=256, value_dim=256),
    Case("other keys", (4, 0, 33, 2), q_counts=(6, 5, 0, 17), dim=24, nobody=1),
    Case("one seed", (18, 3, 0, 40), seeds=1, dim=16, nobody=2),
    Case("four seeds", (9, 55, 1), seeds=4, dim=32, lse=True),
    Case("many seeds", (20, 6), seeds=33, dim=8, value_dim=12),
    Case("seeds, no molecules", (), seeds=3),
    Case("bias", (5, 18, 0, 2), bias="pair", lse=True),
    Case("bias of other keys", (4, 1), q_counts=(3, 9), bias="pair", dim=12),
    Case("float32 bias of seeds", (7, 21), seeds=5, bias="float32"),
    Case("forbidden pairs", (6, 19, 1), bias="mask", lse=True),
    Case("key bias", (18, 3, 0, 33, 70), key_bias="pair", lse=True, nobody=2),
    Case("key bias of all heads", (9, 20), q_counts=(3, 41), heads=3, key_bias="heads", dim=12),
    Case("both biases", (7, 19), bias="pair", key_bias="float32", dropout=0.25, lse=True),
    Case("key bias of seeds", (17, 40, 2), seeds=5, key_bias="float32", dropout=0.3),
    Case("forbidden keys", (6, 19, 35), key_bias="mask", lse=True),
    Case("dropout", (17, 6, 30), dropout=0.3, lse=True),
    Case("dropout of seeds", (17, 6, 9), seeds=6, dropout=0.5, bias="pair"),
    Case("lse", (12, 25), lse=True, index=torch.int32),
    Case("fused projection", (18, 11), heads=4, dim=16, layout="fused"),
    Case("transposed", (18, 11), layout="transposed"),
    Case("expanded", (18, 11), layout="expanded"),
    Case("offset", (18, 11), layout="offset"),
    Case("large logits", (18, 11), logits=30.0),
)


def _make(case: Case, dtype: torch.dtype, device: str, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(
            device, kind
        )

    def packed(rows: int, width: int) -> Tensor:
        return _laid_out(normal(rows, case.heads, width), case.layout)

    k_counts, q_counts = case.counts, case.q_counts or case.counts
    n_k = sum(k_counts) + case.nobody
    n_q = case.seeds if case.seeds is not None else sum(q_counts) + case.nobody
    width = case.value_dim or case.dim
    k_ptr = _ptr(k_counts, case.index, device)
    if case.seeds is not None:
        q_ptr, pairs = None, [case.seeds * n for n in k_counts]
    else:
        q_ptr = k_ptr if case.q_counts is None else _ptr(q_counts, case.index, device)
        pairs = [n * m for n, m in zip(q_counts, k_counts)]
    bias = pair_ptr = ddbias = None
    if case.bias is not None:
        pair_ptr = _ptr(pairs, torch.int64, device)
        kind = torch.float32 if case.bias == "float32" and dtype != torch.float64 else dtype
        bias = normal(sum(pairs), case.heads, kind=kind)
        ddbias = normal(sum(pairs), case.heads, kind=kind)
        if case.bias == "mask":
            forbidden = (
                torch.rand(bias.shape, generator=generator, dtype=torch.float32, device="cpu") < 0.3
            )
            forbidden[: k_counts[0] if k_counts else 0] = True  # every key of the first query
            bias = bias.masked_fill(forbidden.to(device), -torch.inf)
    key_bias = ddkey_bias = None
    if case.key_bias is not None:
        kind = torch.float32 if case.key_bias == "float32" and dtype != torch.float64 else dtype
        of_heads = 1 if case.key_bias == "heads" else case.heads
        key_bias, ddkey_bias = (
            normal(n_k, of_heads, kind=kind).expand(n_k, case.heads) for _ in range(2)
        )
        if case.key_bias == "mask":
            forbidden = (
                torch.rand(key_bias.shape, generator=generator, dtype=torch.float32, device="cpu")
                < 0.3
            )
            forbidden[: k_counts[0]] = True
            key_bias = key_bias.masked_fill(forbidden.to(device), -torch.inf)
    rows = (n_q,) if case.seeds is None else (len(k_counts), n_q)
    q, k, v = packed(n_q, case.dim), packed(n_k, case.dim), packed(n_k, width)
    return Batch(
        case,
        q,
        k,
        v,
        bias,
        key_bias,
        q_ptr,
        k_ptr,
        pair_ptr,
        seed=draw(seed, device) if case.dropout else None,
        scale=case.logits * case.dim**-0.5,
        dout=_laid_out(normal(*rows, case.heads, width), case.layout),
        dlse=normal(*rows, case.heads, kind=accumulator(dtype)) if case.lse else None,
        ddq=packed(n_q, case.dim),
        ddk=packed(n_k, case.dim),
        ddv=packed(n_k, width),
        ddbias=ddbias,
        ddkey_bias=ddkey_bias,
    )


def _ptr(counts: Iterable[int], index: torch.dtype, device: str) -> Tensor:
    counts = torch.tensor([0, *counts], dtype=torch.int64, device="cpu")
    return counts.cumsum(0).to(device, index)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout (expanded: the first head everywhere)."""
    if x.dim() == 4:  # the cotangent of pooled seeds
        return _laid_out(x.flatten(0, 1), layout).unflatten(0, x.shape[:2])
    rows, heads, width = x.shape
    if layout == "fused":
        storage = x.new_zeros(rows, 3, heads, width)
        storage[:, 1] = x
        return storage[:, 1]
    if layout == "transposed":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "expanded":
        return x[:, :1].expand(rows, heads, width)
    if layout == "offset":
        storage = x.new_zeros(x.numel() + 1)
        return storage[1:].view(x.shape).copy_(x)
    return x


def draw(seed: int, device: str) -> Tensor:
    """The seed that an operator draws after ``torch.manual_seed(seed)``."""
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(seed)
        return draw_seed(torch.device(device))
