"""The tensors of the three passes by name.

Each pass is a function of these tuples, in this order: ``Operands``, then (not in the first pass)
``Result`` and its ``Cotangents``, then (in the third) ``Tangents``. They splat into the registered
operators and into ``save_for_backward``. Absent tensors are None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """What every pass reads.

    N_q, N_k rows of queries and keys; S seeds; H heads; D, D_v widths; B molecules; P pairs.
    """

    q: Tensor  # [N_q, H, D]; [S, H, D] where q_ptr is None
    k: Tensor  # [N_k, H, D]
    v: Tensor  # [N_k, H, D_v]
    bias: Tensor | None  # [P, H]
    key_bias: Tensor | None  # [N_k, H]
    q_ptr: Tensor | None  # [B + 1]; None: the rows of q are seeds that every molecule shares
    k_ptr: Tensor  # [B + 1]
    pair_ptr: Tensor | None  # [B + 1] int64, together with bias
    seed: Tensor | None  # [1] int64, together with dropout

    @classmethod
    def plain(
        cls, q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor | None, k_ptr: Tensor
    ) -> Operands:
        """Attention with nothing added to the logits and nothing dropped."""
        absent = dict.fromkeys(cls._fields)
        return cls(**(absent | dict(q=q, k=k, v=v, q_ptr=q_ptr, k_ptr=k_ptr)))  # type: ignore[arg-type]

    @property
    def shared(self) -> bool:
        """Whether q holds seeds."""
        return self.q_ptr is None

    @property
    def molecules(self) -> int:
        return self.k_ptr.shape[0] - 1

    @property
    def rows(self) -> tuple[int, ...]:
        """Leading dimensions of out and lse: (N_q,), or (B, S) for seeds."""
        return (self.molecules, self.q.shape[0]) if self.shared else (self.q.shape[0],)


class Options(NamedTuple):
    """The numbers of a call."""

    scale: float
    dropout: float = 0.0


class Result(NamedTuple):
    """What the first pass returns: [N_q, H, D_v] and [N_q, H], [B, S, H, D_v] and [B, S, H]."""

    out: Tensor
    lse: Tensor


class Cotangents(NamedTuple):
    """Of a ``Result``: the incoming gradients of the second pass."""

    dout: Tensor
    dlse: Tensor | None


class Gradients(NamedTuple):
    """What the second pass returns. dbias is [0, H] where it was not wanted or without a bias."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor
    dkey_bias: Tensor  # [0, H] without a key_bias


class Tangents(NamedTuple):
    """Cotangents of ``Gradients``: the incoming gradients of the third pass. None stands for 0."""

    ddq: Tensor | None
    ddk: Tensor | None
    ddv: Tensor | None
    ddbias: Tensor | None = None
    ddkey_bias: Tensor | None = None


class SecondGradients(NamedTuple):
    """What the third pass returns: gradients of q, k, v, bias, key_bias, dout and dlse."""

    gq: Tensor
    gk: Tensor
    gv: Tensor
    gbias: Tensor  # [0, H] without a bias
    gkey_bias: Tensor  # [0, H] without a key_bias
    gdout: Tensor
    gdlse: Tensor


def split(flat: Iterable[Any], *kinds: type) -> Iterator[Any]:
    """Cuts flat arguments into tuples of these kinds, in this order, and yields what is left."""
    rest = iter(flat)
    for kind in kinds:
        yield kind(*(next(rest) for _ in kind._fields))  # type: ignore[attr-defined]
    yield from rest


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, softmax and LSE: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
