"""The host side of a launch: tensors to kernel arguments, sizes to grids, tensors for results."""

from __future__ import annotations

import math

import torch
import triton

from . import tile_table

_PROGRAMS = 2048  # wanted at least, where programs can be made larger or smaller at will


def arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout) -> dict:
    """Arguments that every pass takes, by name."""
    return dict(
        q=q, k=k, v=v, bias=bias, q_ptr=q_ptr, k_ptr=k_ptr, pair_ptr=pair_ptr, seed=seed,
        sq=q.stride(), sk=k.stride(), sv=v.stride(), sb=strides(bias),
        B=k_ptr.numel() - 1, H=q.shape[1], n_q=q.shape[0], n_k=k.shape[0],
        n_pairs=0 if bias is None else bias.shape[0], scale=float(scale),
        threshold=math.floor(dropout * 2.0**32), keep_scale=1.0 / (1.0 - dropout),
        D=q.shape[-1], DV=v.shape[-1], BD=padded(q.shape[-1]), BDV=padded(v.shape[-1]),
    )  # fmt: skip


def padded(width: int) -> int:
    """Width of the tiles of a head dimension: a power of two, of which tl.dot wants at least 16."""
    return max(16, triton.next_power_of_2(width))


def strides(x: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def row_strides(x: torch.Tensor | None, q_ptr: torch.Tensor | None):
    """(stride of the molecule, strides of the rest) of a tensor shaped as out or lse.

    Without shared seeds there is no axis of molecules: its stride is 0.
    """
    if x is None:
        return 0, None
    return (x.stride(0), x.stride()[1:]) if q_ptr is None else (0, x.stride())


def tile(pass_name: str, q: torch.Tensor, v: torch.Tensor, options: bool) -> dict | None:
    """Block sizes, precision and compiler options of a pass for these tensors; see tile_table."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    width = padded(max(q.shape[-1], v.shape[-1]))
    return tile_table.tile(pass_name, capability, tile_table.precision(q.dtype), width, options)


def schedules(pass_name: str, q, v, q_ptr, rows: int, options: bool) -> list[dict]:
    """Tiles of the launches of a pass, each with the sizes of molecules it serves.

    Which tiles a molecule gets depends on its own size, not on its batch, so its bits do not
    either. rows: of the tiled axis; a batch of fewer rows than LONG has no long molecule.
    """
    short = tile(pass_name, q, v, options)
    long = None if options or q_ptr is None else tile(f"{pass_name}_long", q, v, options)
    if long is None:
        return [short | dict(SHORTEST=0, LONGEST=0)]
    found = [short | dict(SHORTEST=0, LONGEST=tile_table.LONG)]
    return found + [long | dict(SHORTEST=tile_table.LONG, LONGEST=0)] * (rows >= tile_table.LONG)


def tiles_of(rows: int, molecules: int, block: int) -> int:
    """Tiles of a packed axis that covers every molecule and every other row; see primitives."""
    return rows // block + molecules + 2


def query_tiles(q: torch.Tensor, q_ptr: torch.Tensor | None, molecules: int, block: int) -> int:
    if q_ptr is None:
        return triton.cdiv(q.shape[0], block) * molecules
    return tiles_of(q.shape[0], molecules, block)


def chunks(units: int, others: int) -> tuple[int, int]:
    """(units per program, programs) where seeds gather gradients over units; others: per unit."""
    chunk = max(1, units * others // _PROGRAMS)
    return chunk, triton.cdiv(units, chunk)


def on_device(x: torch.Tensor) -> torch.cuda.device_of:
    """Makes the device of x current, where Triton launches; does nothing for a CPU tensor."""
    return torch.cuda.device_of(x)


def out_shape(q: torch.Tensor, v: torch.Tensor, q_ptr: torch.Tensor | None, molecules: int):
    """[N_q, H, D_v], or [B, S, H, D_v] with shared seeds."""
    lead = (molecules,) if q_ptr is None else ()
    return (*lead, *q.shape[:2], v.shape[-1])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def new(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised and contiguous, whatever the strides of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def new_query_gradient(q, q_ptr, parts: int) -> torch.Tensor:
    """Gradient of q, or the partial sums [parts, S, H, D] of the gradient of shared seeds."""
    if q_ptr is not None:
        return new(q)
    return torch.empty((parts, *q.shape), dtype=accumulation(q.dtype), device=q.device)


def new_pairs(q: torch.Tensor, bias: torch.Tensor | None, wanted: bool) -> torch.Tensor:
    """Gradient of bias; [0, H] unless it is wanted."""
    if bias is None or not wanted:
        dtype = q.dtype if bias is None else bias.dtype
        return torch.empty((0, q.shape[1]), dtype=dtype, device=q.device)
    return new(bias)
