"""The facts of one call that decide which backends can serve it, without its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .operands import Operands, Options
from .ragged import longest_of
from .tracing import unreadable

SMALL = 64  # rows of a set up to which the CUDA kernels beat the tiles of Triton, as counted


@dataclass(frozen=True)
class Problem:
    """The facts of one call that decide which backends can serve it.

    It can be asked about on any machine: ``explain(Problem("cuda", torch.bfloat16, 32, 32))``.

    Examples:
        >>> Problem("cuda", torch.float16, head_dim=64, value_dim=64, seeds=4).seeds
        4
    """

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    capability: tuple[int, int] | None = None  # of a CUDA device
    seeds: int | None = None  # number of shared queries; None for set_attention
    bias: bool = False
    key_bias: bool = False
    dropout: bool = False
    grad_order: int = 0  # highest derivative that the call may need
    deterministic: bool = False
    return_lse: bool = False
    small_sets: bool = False  # on a GPU: no set of more than 64 rows, as far as can be told

    @classmethod
    def of(cls, x: Operands, options: Options, grad_order: int, return_lse: bool) -> Problem:
        """The facts of a call with these tensors on this machine."""
        device = x.q.device
        return cls(
            device=device.type,
            dtype=x.q.dtype,
            head_dim=x.q.shape[2],
            value_dim=x.v.shape[2],
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            seeds=x.q.shape[0] if x.q_ptr is None else None,
            bias=x.bias is not None,
            key_bias=x.key_bias is not None,
            dropout=True if options.dropout > 0 else False,  # noqa: SIM210 - a compiler's symbol
            grad_order=grad_order,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            return_lse=return_lse,
            small_sets=device.type == "cuda" and _are_small(x),
        )


def _are_small(x: Operands) -> bool:
    """By the longest set where it is known, else by the mean, which needs no wait for the device.

    Of a graph, which outlives the sizes, nothing is known.
    """
    if unreadable(x.k_ptr) or unreadable(x.k):
        return False
    longest = longest_of(x.q_ptr, x.k_ptr, x.q.shape[0])
    if longest is not None:
        return longest <= SMALL
    queries = x.q.shape[0] * (x.molecules if x.shared else 1)
    return max(queries, x.k.shape[0]) <= SMALL * x.molecules
