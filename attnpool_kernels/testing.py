"""Cases, oracle and error budget that judge a backend. Shipped, so third parties can use them too.

``check_backend(name)`` runs the cases through the public functions, ``check_kernels(module)`` the
three passes of a kernel module directly; both compare values, gradients and second gradients with
float64 and raise AssertionError naming case, tensor, error and budget.

The oracle is a dense masked softmax over the whole batch in float64, differentiated by torch; it
shares no code with ``backends.reference``. The budget is relative to the same dense formula in the
tested dtype: at most 2 times its error for out and lse, 3 times for gradients and second gradients,
plus the rounding of the result itself; and a ceiling for the relative Frobenius error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dropout import draw_seed, keep_mask
from .functional import seed_pool, set_attention
from .ops import accumulator
from .ragged import Ragged

# Relative Frobenius error of anything a backend returns, see ``violations``.
CEILING = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
FACTOR = {"out": 2.0, "lse": 2.0}  # against same-dtype math; gradients: 3


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

    def inputs(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.bias) if x is not None]


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
    rows = (n_q,) if case.seeds is None else (len(k_counts), n_q)
    q, k, v = packed(n_q, case.dim), packed(n_k, case.dim), packed(n_k, width)
    return Batch(
        case, q, k, v, bias, q_ptr, k_ptr, pair_ptr,
        seed=draw(seed, device) if case.dropout else None,
        scale=case.logits * case.dim**-0.5,
        dout=_laid_out(normal(*rows, case.heads, width), case.layout),
        dlse=normal(*rows, case.heads, kind=accumulator(dtype)) if case.lse else None,
        ddq=packed(n_q, case.dim), ddk=packed(n_k, case.dim), ddv=packed(n_k, width),
        ddbias=ddbias,
    )  # fmt: skip


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


def dense(
    batch: Batch, dtype: torch.dtype, inputs: list[Tensor], scale_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax over all keys of the batch with other molecules masked, in ``dtype``.

    inputs: q, k, v and, where there is one, bias. Differentiable in any order. scale_first: q and k
    are multiplied by the root of the scale, as in torch's own attention, not their product.
    """
    q, k, v = (x.to(dtype) for x in inputs[:3])
    scale = batch.scale
    if scale_first:
        q, k, scale = q * scale**0.5, k * scale**0.5, 1.0
    case, molecules = batch.case, len(batch.case.counts)
    k_of = torch.full((k.shape[0],), -1, device=q.device)
    k_of[: sum(case.counts)] = torch.repeat_interleave(
        torch.arange(molecules, device=q.device),
        torch.tensor(case.counts, device=q.device, dtype=torch.int64),
    )
    if case.seeds is not None:
        q_of = torch.arange(molecules, device=q.device).repeat_interleave(case.seeds)
        q = q.repeat(molecules, 1, 1)
    else:
        counts = case.q_counts or case.counts
        q_of = torch.full((q.shape[0],), -2, device=q.device)
        q_of[: sum(counts)] = torch.repeat_interleave(
            torch.arange(molecules, device=q.device),
            torch.tensor(counts, device=q.device, dtype=torch.int64),
        )
    own = (q_of[:, None] == k_of[None, :]).to(q.device)  # row-major order is the order of pairs
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    if len(inputs) > 3:
        spread = logits.new_zeros(logits.shape[1], logits.shape[2], logits.shape[0])
        spread = spread.index_put(tuple(own.nonzero().T), inputs[3].to(dtype))
        logits = logits + spread.permute(2, 0, 1)
    allowed = own[None] & (logits != -torch.inf)
    dead = ~allowed.any(2, keepdim=True)
    logits = torch.where(allowed, logits, logits.new_full((), -torch.inf)).masked_fill(dead, 0.0)
    weights = torch.where(dead, 0.0, torch.softmax(logits, 2)) if logits.shape[2] else logits
    if batch.seed is not None:
        weights = weights * _dense_keep(batch, own) / (1.0 - case.dropout)
    out = torch.einsum("hij,jhd->ihd", weights.to(dtype), v)
    lse = logits.logsumexp(2) if logits.shape[2] else logits.sum(2)
    lse = lse.masked_fill(dead.squeeze(2), -torch.inf).T
    if case.seeds is not None:
        out = out.reshape(molecules, case.seeds, *out.shape[1:])
        lse = lse.reshape(molecules, case.seeds, *lse.shape[1:])
    return out, lse


def _dense_keep(batch: Batch, own: Tensor) -> Tensor:
    case = batch.case
    assert batch.seed is not None
    keep = torch.zeros(case.heads, *own.shape, dtype=torch.bool, device=own.device)
    q_counts = [case.seeds] * len(case.counts) if case.seeds else case.q_counts or case.counts
    row = column = 0
    for molecule, (n, m) in enumerate(zip(q_counts, case.counts)):
        block = keep_mask(batch.seed, molecule, case.heads, n, m, case.dropout)
        keep[:, row : row + n, column : column + m] = block
        row, column = row + n, column + m
    return keep


def differentiate(
    run: Callable[[list[Tensor]], tuple[Tensor, Tensor]], batch: Batch, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """All outputs of the three passes through torch's autograd.

    dtype: cast inputs and cotangents to it first (None: leave the layout and dtype alone).
    """

    def leaf(x: Tensor) -> Tensor:
        return (x if dtype is None else x.to(dtype)).detach().requires_grad_()

    inputs = [leaf(x) for x in batch.inputs()]
    out, lse = run(inputs)
    outputs, cotangents = [out], [leaf(batch.dout).to(out.dtype)]
    if batch.dlse is not None:
        outputs.append(lse)
        cotangents.append(leaf(batch.dlse).to(lse.dtype))
    first = torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=True, materialize_grads=True
    )
    seconds = [x for x in (batch.ddq, batch.ddk, batch.ddv, batch.ddbias) if x is not None]
    wanted = [*inputs, *cotangents]
    second = torch.autograd.grad(
        [x for x in first if x.requires_grad],
        wanted,
        [y.to(x.dtype) for x, y in zip(first, seconds) if x.requires_grad],
        materialize_grads=True,
        allow_unused=True,
    )
    names = ["q", "k", "v", "bias"][: len(inputs)]
    result = {"out": out.detach(), "lse": lse.detach()}
    result |= {f"d{name}": x.detach() for name, x in zip(names, first)}
    names += ["dout", "dlse"][: len(cotangents)]
    return result | {f"g{name}": x for name, x in zip(names, second)}


def run_public(batch: Batch, backend: str | None) -> dict[str, Tensor]:
    """The three passes through ``set_attention`` or ``seed_pool``."""

    def run(inputs: list[Tensor]) -> Any:
        q, k, v = inputs[:3]
        options: dict[str, Any] = {
            "bias": inputs[3] if len(inputs) > 3 else None,
            "scale": batch.scale,
            "dropout": batch.case.dropout,
            "backend": backend,
            "return_lse": True,
        }
        torch.manual_seed(0)  # the seed that ``make`` has drawn
        if batch.q_ptr is None:
            return seed_pool(q, k, v, batch.k_ptr, **options)
        keys = None if batch.q_ptr is batch.k_ptr else Ragged.from_ptr(batch.k_ptr)
        return set_attention(q, k, v, batch.q_ptr, keys, **options)

    return differentiate(run, batch, None)


def run_kernels(batch: Batch, kernels: ModuleType) -> dict[str, Tensor]:
    """The three passes of a kernel backend, called directly."""
    problem = (
        batch.q, batch.k, batch.v, batch.bias, batch.q_ptr, batch.k_ptr, batch.pair_ptr, batch.seed,
    )  # fmt: skip
    options = batch.scale, batch.case.dropout
    out, lse = kernels.forward(*problem, *options)
    known = (*problem, out, lse, batch.dout, batch.dlse)
    first = kernels.backward(*known, *options, batch.bias is not None)
    seconds = batch.ddq, batch.ddk, batch.ddv, batch.ddbias
    second = kernels.double_backward(*known, *seconds, *options)
    result = {"out": out, "lse": lse}
    result |= zip(("dq", "dk", "dv", "dbias"), first)
    result |= zip(("gq", "gk", "gv", "gbias", "gdout", "gdlse"), second)
    if batch.bias is None:
        del result["dbias"], result["gbias"]
    if batch.dlse is None:
        del result["gdlse"]
    return result


def violations(
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    same: list[dict[str, Tensor]],
    dtype: torch.dtype,
    slack: float = 1.0,
) -> list[str]:
    """What is wrong with a result, one line a tensor; empty when it is inside the budget.

    exact: the float64 oracle; same: the yardsticks, one or more ways to write the formula in
    ``dtype``, of which the worst counts: the error of one alone can be small by luck. slack: a
    factor on the budget.
    """
    lines = []
    for name, truth in exact.items():
        x, reference = found[name].double().cpu(), truth.double().cpu()
        yards = [other[name].double().cpu() for other in same]
        if x.shape != reference.shape:
            lines.append(f"{name}: shape {tuple(x.shape)}, expected {tuple(reference.shape)}")
            continue
        if not torch.equal(x.isfinite(), reference.isfinite()) or not torch.equal(
            x[~reference.isfinite()], reference[~reference.isfinite()]
        ):
            lines.append(f"{name}: not finite in other places than the oracle")
            continue
        good = reference.isfinite()
        x, reference = x[good], reference[good]
        misses = [yard[good] - reference for yard in yards]
        if x.numel() == 0:
            continue
        error, factor = (x - reference).abs().max().item(), slack * FACTOR.get(name, 3.0)
        half = reference.to(found[name].dtype)
        floor = 2 * (half + 0.3 - 0.3 - half).double().abs().max().item()
        # Cancellation to an exact zero (one atom: dS = 0) leaves a few units of the accumulator.
        floor += 4 * torch.finfo(accumulator(dtype)).eps
        norm = reference.norm().item()
        ceiling = max(CEILING[dtype] * norm, factor * max(m.norm().item() for m in misses))
        relative = (x - reference).norm().item()
        budget = factor * max(m.abs().max().item() for m in misses) + floor
        if dtype != torch.float64 and error > budget:
            lines.append(f"{name}: error {error:.3g}, budget {budget:.3g}")
        if relative > ceiling + floor * x.numel() ** 0.5:
            lines.append(f"{name}: Frobenius error {relative:.3g}, ceiling {ceiling:.3g}")
    return lines


def judge(
    case: Case,
    dtype: torch.dtype,
    run: Callable[[Batch], dict[str, Tensor]],
    device: str = "cpu",
    slack: float = 1.0,
) -> None:
    """Raises AssertionError where ``run`` on the case is outside ``slack`` times the budget."""
    batch = case.make(dtype, device)
    found = run(batch)
    exact = differentiate(lambda x: dense(batch, torch.float64, x), batch, torch.float64)
    same = [
        differentiate(lambda x: dense(batch, dtype, x), batch, dtype),
        differentiate(lambda x: dense(batch, dtype, x, scale_first=True), batch, dtype),
    ]
    lines = violations(found, exact, same, dtype, slack)
    if lines:
        raise AssertionError(f"{case.name}, {dtype}: " + "; ".join(lines))


def check_backend(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu",
    cases: Iterable[Case] = CASES,
) -> None:  # fmt: skip
    """Judges a backend by name on all cases and both index types, through the public functions."""
    for case in cases:
        judge(case, dtype, lambda batch: run_public(batch, name), device)
    judge(
        replace(CASES[0], index=torch.int32), dtype, lambda batch: run_public(batch, name), device
    )


def check_kernels(
    kernels: ModuleType, dtype: torch.dtype = torch.float32, device: str = "cpu",
    cases: Iterable[Case] = CASES,
) -> None:  # fmt: skip
    """Judges the three functions of a kernel module on all cases."""
    for case in cases:
        judge(case, dtype, lambda batch: run_kernels(batch, kernels), device)
