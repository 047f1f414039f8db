"""First-order model of the rounding error that a careful kernel may make, result by result.

Every quantity of (F1)-(D12) is computed in float64 as its exact value x and, beside it, the mean
square e of the error that it has in a kernel which sums in float32 (float64 for float64) and rounds
to the stored type what enters a product of weights. The rules, with u = eps/4, the root mean square
of a relative rounding to nearest (the worst is eps/2)::

    x stored in a type              e += (u x)²
    sum of x_1 … x_n = T            e  = Σ e_j + u²((r + 1)(T²/3 + Σx²/6) + Σx²)
    z = f(x, y)                     e  = (∂f/∂x)² e_x + (∂f/∂y)² e_y, then stored

The second line is what the r additions of a sum in random order leave, and the rounding of its
terms: the partial sum of m of n terms has the mean square m/n Σx² + m(m-1)/n(n-1) (T² - Σx²).
r = min(n, 128) + n/128: long sums are made of sums of blocks.

Errors of single pairs are independent. An error of a row's statistic (lse, δ, t, y) reaches all
keys of the row alike, so a sum over keys adds it up where those of pairs partly cancel: such an
error is kept apart in ``shared``, as its derivative times its size, until a sum over queries mixes
the rows.

Nothing here is measured. The variances depend on the numbers of the batch, on its sizes and on the
types, and are the same on every machine up to the rounding of float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dropout import keep_mask
from ..operands import accumulator
from .cases import Batch

BLOCK = 128  # terms that are summed one after another
EXP = 3.0  # roundings in an exponential: its error is below 2 units in the last place


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean square of the error of rounding x to ``dtype``; below the normal numbers it is fixed."""
    info = torch.finfo(dtype)
    size = torch.where(x == 0, x, x.abs().clamp(min=info.tiny))
    return (size * (info.eps / 4)) ** 2


def summed(total: Tensor, squares: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Mean square of the error of summing ``terms`` numbers in ``dtype``."""
    run = min(terms, BLOCK) + terms / BLOCK
    parts = (run + 1) * (total**2 / 3 + squares / 6) + squares
    return (torch.finfo(dtype).eps / 4) ** 2 * parts


@dataclass
class Rounded:
    """Exact values, the mean square of the errors of their own, and the errors a row shares."""

    value: Tensor
    own: Tensor
    type: torch.dtype  # in which it is computed
    shared: dict[str, Tensor] = field(default_factory=dict)

    def _new(self, value: Tensor, own: Tensor, shared: dict[str, Tensor]) -> Rounded:
        return Rounded(value, own + stored(value, self.type), self.type, shared)

    def _merge(self, other: Rounded, mine: Tensor | float, its: Tensor | float) -> dict:
        """The shared errors of a function of both with these derivatives."""
        names = {**self.shared, **other.shared}
        zero = self.value.new_zeros(())
        return {
            name: self.shared.get(name, zero) * mine + other.shared.get(name, zero) * its
            for name in names
        }

    def __add__(self, other: Rounded) -> Rounded:
        return self._new(
            self.value + other.value, self.own + other.own, self._merge(other, 1.0, 1.0)
        )

    def __sub__(self, other: Rounded) -> Rounded:
        return self._new(
            self.value - other.value, self.own + other.own, self._merge(other, 1.0, -1.0)
        )

    def __mul__(self, other: Rounded) -> Rounded:
        own = self.own * other.value**2 + other.own * self.value**2
        return self._new(self.value * other.value, own, self._merge(other, other.value, self.value))

    def times(self, factor: Tensor | float) -> Rounded:
        """The product with exact numbers."""
        shared = {name: x * factor for name, x in self.shared.items()}
        return self._new(self.value * factor, self.own * factor**2, shared)

    def to(self, dtype: torch.dtype) -> Rounded:
        """Stored in a type; a wider one changes nothing."""
        if torch.finfo(dtype).eps <= torch.finfo(self.type).eps:
            return self
        return Rounded(self.value, self.own + stored(self.value, dtype), self.type, self.shared)

    def over_keys(self, y: Tensor) -> Rounded:
        """Σ_j x_ij y_j, y exact: [heads, keys, width]."""
        total, squares = self.value @ y, self.value**2 @ y**2
        own = self.own @ y**2 + summed(total, squares, y.shape[1], self.type)
        shared = {name: x.expand_as(self.value) @ y for name, x in self.shared.items()}
        return Rounded(total, own, self.type, shared)

    def over_queries(self, y: Tensor) -> Rounded:
        """Σ_i x_ij y_i, y exact: [heads, queries, width]. Rows err independently."""
        total, squares = self.value.mT @ y, (self.value**2).mT @ y**2
        own = self.variance().mT @ y**2 + summed(total, squares, y.shape[1], self.type)
        return Rounded(total, own, self.type)

    def row_sum(self) -> Rounded:
        """Σ_j x_ij as a column."""
        return self.over_keys(self.value.new_ones(self.value.shape[0], self.value.shape[2], 1))

    def row_statistic(self, name: str) -> Rounded:
        """A column whose own error the row will share from here on."""
        shared = {**self.shared, name: self.own.sqrt()}
        return Rounded(self.value, torch.zeros_like(self.own), self.type, shared)

    def variance(self) -> Tensor:
        return self.own + sum((x**2 for x in self.shared.values()), torch.zeros_like(self.own))


def inner(x: Tensor, y: Tensor, dtype: torch.dtype) -> Rounded:
    """Inner products of exact rows: [heads, queries, width] and [heads, keys, width]."""
    total, squares = x @ y.mT, x**2 @ (y**2).mT
    return Rounded(total, summed(total, squares, x.shape[2], dtype), dtype)


def molecule(batch: Batch, index: int, dtype: torch.dtype) -> dict[str, Rounded]:
    """(F1)-(D12) of one molecule with keys and queries, [heads, rows, width] and pairs as such."""
    x = Cut(batch, index)
    q, k, v, dout, ddq, ddk, ddv = (
        x.rows(name) for name in ("q", "k", "v", "dout", "ddq", "ddk", "ddv")
    )
    c, wide = batch.scale, accumulator(dtype)
    bias = None if batch.bias is None else x.pairs(batch.bias)
    forbidden = torch.zeros_like(q @ k.mT, dtype=torch.bool)

    s = inner(q, k, wide).times(c)  # (F1)
    s.own += 2 * stored(s.value, wide)  # of the scale, and of the units of the exponential
    if bias is not None:
        forbidden = bias == -torch.inf
        s += Rounded(bias.masked_fill(forbidden, 0.0), torch.zeros_like(bias), wide)
    if batch.key_bias is not None:
        of_keys = x.rows("key_bias").mT
        forbidden = forbidden | (of_keys == -torch.inf)
        of_keys = of_keys.masked_fill(of_keys == -torch.inf, 0.0).expand(s.value.shape)
        s += Rounded(of_keys, torch.zeros_like(of_keys), wide)
    value = s.value.masked_fill(forbidden, -torch.inf)
    dead = forbidden.all(2, keepdim=True)
    lse = value.logsumexp(2, keepdim=True).masked_fill(dead, 0.0)
    p_value = (value - lse).exp()
    s_less = s.own + stored((value - lse).masked_fill(forbidden, 0.0), wide)
    p_own = p_value**2 * s_less + EXP * stored(p_value, wide)
    p_own += (p_value > 0).double() * torch.finfo(wide).tiny ** 2  # the smallest may become 0
    sum_own = p_own.sum(2, keepdim=True)
    sum_own += summed(sum_own * 0 + 1, (p_value**2).sum(2, keepdim=True), k.shape[1], wide)
    lse_own = (sum_own + 2 * stored(lse, wide)).masked_fill(dead, 0.0)
    normalised = Rounded(p_value, p_own, wide, {"lse": p_value * sum_own.sqrt()})
    p = Rounded(p_value, p_own, wide, {"lse": p_value * lse_own.sqrt()})  # (F2) from lse

    r = x.keep()

    def kept(y: Rounded) -> Rounded:
        return y if r is None else y.times(r)

    out = kept(normalised).to(dtype).over_keys(v)  # (F3)
    dp = kept(inner(dout, v, wide))  # (B1)
    delta = (p * dp).row_sum()  # (B2), of an output that is stored
    delta.own += stored(out.value * dout, dtype).sum(2, keepdim=True)
    dlse = torch.zeros_like(delta.value) if batch.dlse is None else x.rows("dlse")
    delta_l = delta - Rounded(dlse.masked_fill(dead, 0.0), torch.zeros_like(dlse), wide)
    delta_l = delta_l.row_statistic("delta")
    ds = p * (dp - delta_l)  # (B3)
    ds_half = ds.to(dtype)
    result = {
        "out": out,
        "lse": Rounded(lse.masked_fill(dead, -torch.inf), lse_own, wide),
        "dv": kept(p).to(dtype).over_queries(dout),  # (B4)
        "dq": ds_half.over_keys(k).times(c),  # (B5)
        "dk": ds_half.over_queries(q).times(c),  # (B6)
        "dbias": ds,  # (B7)
        "dkey_bias": ds.over_queries(torch.ones_like(q[..., :1])),  # (B8)
    }

    t = inner(torch.cat([ddq, q], 2), torch.cat([k, ddk], 2), wide).times(c)  # (D1)
    if batch.ddbias is not None:
        ddbias = x.pairs(batch.ddbias)
        t += Rounded(ddbias, torch.zeros_like(ddbias), wide)
    if batch.ddkey_bias is not None:
        of_keys = x.rows("ddkey_bias").mT.expand(t.value.shape)
        t += Rounded(of_keys, torch.zeros_like(of_keys), wide)
    t_row = (p * t).row_sum()  # (D2)
    t_less = t - t_row.row_statistic("t")
    g = kept(inner(dout, ddv, wide))  # (D3)
    # (D4) and (D6) are Z = P∘(X - rowsum(P∘X)); as they are written, T∘dP, t·dP and δt cancel
    x_terms = t_less * (dp - delta_l) + g
    x_terms.own += 3 * stored(t.value * dp.value, wide)
    y_row = (p * x_terms).row_sum()
    y_row.own += 4 * stored(t_row.value * delta.value, wide)
    z = p * (x_terms - y_row.row_statistic("y"))
    u = kept(p * t_less).to(dtype)  # (D5)
    z_half = z.to(dtype)
    return (
        result
        | {
            "gq": (ds_half.over_keys(ddk) + z_half.over_keys(k)).times(c),  # (D7)
            "gk": (ds_half.over_queries(ddq) + z_half.over_queries(q)).times(c),  # (D8)
            "gv": u.over_queries(dout),  # (D9)
            "gbias": z,  # (D10)
            "gdout": u.over_keys(v) + kept(p).to(dtype).over_keys(ddv),  # (D11)
            "gdlse": t_row,  # (D12)
            "gkey_bias": z.over_queries(torch.ones_like(q[..., :1])),  # (D13)
        }
    )


class Cut:
    """The part of a batch's tensors that one molecule sees, in float64 on the CPU."""

    def __init__(self, batch: Batch, index: int) -> None:
        case = batch.case
        self.batch, self.index = batch, index
        q_counts = case.q_counts or case.counts
        self.keys = _slice(case.counts, index)
        self.queries = slice(0, case.seeds) if case.seeds else _slice(q_counts, index)
        self.n, self.m = self.queries.stop - self.queries.start, case.counts[index]
        q_sizes = [case.seeds or n for n in q_counts]
        self.pair_rows = _slice([n * m for n, m in zip(q_sizes, case.counts)], index)

    def place(self, name: str) -> slice | int:
        """Where the molecule's part of an input or result with this name is."""
        kind = name.lstrip("dg")
        if kind == "bias":
            return self.pair_rows
        if kind in ("k", "v", "key_bias"):
            return self.keys
        return self.index if self.batch.case.seeds and kind in ("out", "lse") else self.queries

    def rows(self, name: str) -> Tensor:
        part = getattr(self.batch, name)[self.place(name)].double().cpu()
        return (part if part.dim() == 3 else part[..., None]).transpose(0, 1)

    def pairs(self, x: Tensor) -> Tensor:
        return x[self.pair_rows].double().cpu().reshape(self.n, self.m, -1).permute(2, 0, 1)

    def keep(self) -> Tensor | None:
        batch, rate = self.batch, self.batch.case.dropout
        if batch.seed is None:
            return None
        mask = keep_mask(batch.seed.cpu(), self.index, batch.case.heads, self.n, self.m, rate)
        return mask.double() / (1.0 - rate)


def _slice(counts: list[int] | tuple[int, ...], index: int) -> slice:
    start = sum(counts[:index])
    return slice(start, start + counts[index])


def model(batch: Batch, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, variance) of every result, in the shape of the results; float64, on the CPU.

    The variance is that before a result is stored.
    """
    case, wide = batch.case, accumulator(dtype)
    lse_shape = batch.dout.shape[:-1]
    shapes = {"out": batch.dout.shape, "lse": lse_shape}
    for letter in "dg":
        shapes |= {f"{letter}{name}": getattr(batch, name).shape for name in ("q", "k", "v")}
        for name in ("bias", "key_bias"):
            if getattr(batch, name) is not None:
                shapes[f"{letter}{name}"] = getattr(batch, name).shape
    shapes["gdout"] = batch.dout.shape
    if batch.dlse is not None:
        shapes["gdlse"] = lse_shape

    def zeros(shape) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")

    found = {name: (zeros(shape), zeros(shape)) for name, shape in shapes.items()}
    found["lse"][0].fill_(-torch.inf)
    added = 0
    for index, keys in enumerate(case.counts):
        cut = Cut(batch, index)
        if not cut.n or not keys:
            continue
        added += 1
        for name, x in molecule(batch, index, dtype).items():
            if name not in found:
                continue
            value, variance = (packed(y, name) for y in (x.value, x.variance()))
            place = cut.place(name)
            if case.seeds and name in ("dq", "gq"):  # summed over the molecules
                found[name][0].add_(value)
                found[name][1].add_(variance)
            else:
                found[name][0][place], found[name][1][place] = value, variance
    if case.seeds and added:
        for name in ("dq", "gq"):
            total, variance = found[name]
            variance += summed(total, total**2, added, wide)
    return found


def packed(x: Tensor, name: str) -> Tensor:
    """[heads, rows, width] to the layout of a result."""
    if name.lstrip("dg") == "bias":
        return x.permute(1, 2, 0).flatten(0, 1)
    x = x.transpose(0, 1)
    return x[..., 0] if name.endswith(("lse", "key_bias")) else x
