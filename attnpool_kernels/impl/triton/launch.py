"""The host side of a launch: tensors to kernel arguments, sizes to grids, tensors for results."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...operands import Cotangents, Operands, Options, Result, Tangents
from . import tile_table
from .arguments import Batched, Rows

_PROGRAMS = 2048  # wanted at least, where programs can be made larger or smaller at will


def arguments(x: Operands, options: Options) -> dict:
    """Arguments that every pass takes, by name."""
    held: Any = x
    read = {name: rows(getattr(x, name)) for name in ("q", "k", "v", "bias", "key_bias")}
    return dict(
        x=held._replace(**read),
        B=x.molecules,
        H=x.q.shape[1],
        n_q=x.q.shape[0],
        n_k=x.k.shape[0],
        n_pairs=0 if x.bias is None else x.bias.shape[0],
        scale=float(options.scale),
        threshold=math.floor(options.dropout * 2.0**32),
        keep_scale=1.0 / (1.0 - options.dropout),
        D=x.q.shape[-1],
        DV=x.v.shape[-1],
        BD=padded(x.q.shape[-1]),
        BDV=padded(x.v.shape[-1]),
    )


def padded(width: int) -> int:
    """Width of the tiles of a head dimension: a power of two, of which tl.dot wants at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def rows(x: torch.Tensor | None) -> Rows | None:
    return None if x is None else Rows(x, x.stride())


def carry(kind: Any, *members: Any) -> Any:
    """A tuple as kernels take it: its members are Rows and the like, None where they are absent."""
    return kind(*members)


def without(carried: Any, *names: str) -> Any:
    """The tuple with these members absent."""
    return carried._replace(**dict.fromkeys(names))


def result(y: Result) -> Any:
    """Rows of out and lse; molecules with shared seeds follow each other as if they were packed."""
    return carry(Result, Rows(y.out, y.out.stride()[-3:]), Rows(y.lse, y.lse.stride()[-2:]))


def cotangents(dy: Cotangents, shared: bool) -> Any:
    return carry(Cotangents, batched(dy.dout, shared), batched(dy.dlse, shared))


def batched(x: torch.Tensor | None, shared: bool) -> Batched | None:
    """Of a tensor shaped as out or lse; without shared seeds it has no axis of molecules."""
    if x is None:
        return None
    return Batched(x, x.stride(0), x.stride()[1:]) if shared else Batched(x, 0, x.stride())


def tangents(t: Tangents) -> Any:
    return carry(Tangents, *map(rows, t))


def tile(pass_name: str, x: Operands) -> dict | None:
    """Block sizes, precision and compiler options of a pass; see tile_table."""
    capability = torch.cuda.get_device_capability(x.q.device) if x.q.is_cuda else None
    width = padded(max(x.q.shape[-1], x.v.shape[-1]))
    row = tile_table.precision(x.q.dtype)
    key_bias = x.key_bias is not None
    return tile_table.tile(pass_name, capability, row, width, has_options(x), key_bias)


def chosen(pass_name: str, x: Operands) -> dict:
    """``tile`` of a pass that has one."""
    found = tile(pass_name, x)
    assert found is not None, pass_name
    return found


def has_options(x: Operands) -> bool:
    """Whether there is a bias, a key bias or dropout: all take registers."""
    return x.bias is not None or x.key_bias is not None or x.seed is not None


def tiles_of(number: int, molecules: int, block: int) -> int:
    """Tiles of a packed axis that covers every molecule and every other row; see primitives."""
    return number // block + molecules + 2


def query_tiles(x: Operands, parts: int, block: int) -> int:
    """Tiles of the queries; parts: the molecules, or what serves several of them with seeds."""
    if x.shared:
        return -(-x.q.shape[0] // block) * parts
    return tiles_of(x.q.shape[0], parts, block)


def chunks(units: int, others: int) -> tuple[int, int]:
    """(units per program, programs) where seeds gather gradients over units; others: per unit."""
    chunk = max(1, units * others // _PROGRAMS)
    return chunk, -(-units // chunk)


def query_chunks(x: Operands, block: int) -> tuple[int, int]:
    """(molecules per program of a tile of queries, programs)."""
    if not x.shared:
        return 1, x.molecules
    return chunks(x.molecules, query_tiles(x, 1, block) * x.q.shape[1])


def on_device(x: torch.Tensor) -> torch.cuda.device_of:
    """Makes the device of x current, where Triton launches; does nothing for a CPU tensor."""
    return torch.cuda.device_of(x)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def new(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised and contiguous, whatever the strides of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def new_result(x: Operands) -> Result:
    shape, device = (*x.rows, x.q.shape[1]), x.q.device
    return Result(
        torch.empty((*shape, x.v.shape[-1]), dtype=x.q.dtype, device=device),
        torch.empty(shape, dtype=accumulation(x.q.dtype), device=device),
    )


def new_query_gradient(x: Operands, parts: int) -> torch.Tensor:
    """Gradient of q, or the partial sums [parts, S, H, D] of the gradient of shared seeds."""
    if not x.shared:
        return new(x.q)
    return torch.empty((parts, *x.q.shape), dtype=accumulation(x.q.dtype), device=x.q.device)


def new_pairs(x: Operands, wanted: bool) -> torch.Tensor:
    """Gradient of bias; [0, H] unless it is wanted."""
    if x.bias is None or not wanted:
        dtype = x.q.dtype if x.bias is None else x.bias.dtype
        return torch.empty((0, x.q.shape[1]), dtype=dtype, device=x.q.device)
    return new(x.bias)


def new_key_bias(x: Operands) -> torch.Tensor:
    """Gradient of key_bias; [0, H] without one."""
    if x.key_bias is None:
        return torch.empty((0, x.q.shape[1]), dtype=x.q.dtype, device=x.q.device)
    return new(x.key_bias)


def if_given(operand: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor | None:
    """The gradient of an operand as kernels take it: None where there is no operand."""
    return None if operand is None else gradient
