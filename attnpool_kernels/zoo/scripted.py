"""The aggregations of ``zoo.pyg`` for TorchScript; see ``nn.scripted``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.scripted import equal


def grouped(
    x: Tensor, index: Tensor | None, ptr: Tensor | None, dim_size: int | None, dim: int
) -> tuple[Tensor, Tensor]:
    """The rows of x, group after group, and their boundaries [B + 1]."""
    if x.dim() != 2 or (dim != -2 and dim != 0):
        raise ValueError(f"x must have shape [N, C] and dim be -2 or 0, got {x.shape} and {dim}")
    if ptr is not None:
        if not ptr.is_cuda and int(ptr[-1]) != x.size(0):
            raise ValueError(f"ptr[-1] must be the number of rows, {x.size(0)}, got {ptr[-1]}")
        if dim_size is not None and dim_size != ptr.numel() - 1:
            raise ValueError(f"dim_size must be the number of groups, got {dim_size}")
        return x, ptr
    if index is None:
        count = 1 if dim_size is None else dim_size
        index = torch.zeros(x.size(0), dtype=torch.int64, device=x.device)
    else:
        if index.dim() != 1 or index.size(0) != x.size(0):
            raise ValueError(f"index must have shape [{x.size(0)}], got {index.shape}")
        count = (int(index.max()) + 1 if index.numel() > 0 else 0) if dim_size is None else dim_size
        if index.numel() > 0 and (int(index.min()) < 0 or int(index.max()) >= count):
            raise ValueError(f"index must be from 0 to dim_size - 1 = {count - 1}")
        index, order = index.sort(stable=True)
        x = x.index_select(0, order)
    edges = torch.arange(count + 1, device=x.device, dtype=index.dtype)
    return x, torch.searchsorted(index, edges)


def set_transformer_aggregation(
    self,
    x: Tensor,
    index: Tensor | None = None,
    ptr: Tensor | None = None,
    dim_size: int | None = None,
    dim: int = -2,
    max_num_elements: int | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, index, ptr, dim_size, dim, max_num_elements)
    rows, edges = grouped(x, index, ptr, dim_size, dim)
    for block in self.encoders:
        rows = block(rows, edges)
    out = self.pma(rows, edges)
    seeds = out.flatten(0, 1)
    boundaries = equal(seeds, out.size(1))
    for block in self.decoders:
        seeds = block(seeds, boundaries)
    out = seeds.view(-1, out.size(1), out.size(2)).nan_to_num()
    if self.empty == "zero":
        out = out.masked_fill((edges.diff() == 0)[:, None, None], 0.0)
    return out.flatten(1, 2) if self.concat else out.mean(1)


def graph_multiset_transformer(
    self,
    x: Tensor,
    index: Tensor | None = None,
    ptr: Tensor | None = None,
    dim_size: int | None = None,
    dim: int = -2,
    max_num_elements: int | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, index, ptr, dim_size, dim, max_num_elements)
    rows, edges = grouped(x, index, ptr, dim_size, dim)
    seeds = self.pma1(rows, edges).flatten(0, 1)
    boundaries = equal(seeds, self.k)
    for block in self.encoders:
        seeds = block(seeds, boundaries)
    return self.pma2(seeds, boundaries).squeeze(1)


def pooling_aggregation(
    self,
    x: Tensor,
    index: Tensor | None = None,
    ptr: Tensor | None = None,
    dim_size: int | None = None,
    dim: int = -2,
    max_num_elements: int | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, index, ptr, dim_size, dim, max_num_elements)
    rows, edges = grouped(x, index, ptr, dim_size, dim)
    out = self.pool(rows, edges)
    if self.head is not None:
        out = self.head(out)
    return out
