"""The verdict: errors of a result against the variances that ``rounding`` allows.

With e the variance of a number before it is stored, and u the root mean square of the rounding that
stores it (``rounding.stored``), the error of a result x passes where::

    each number      |error| <= SINGLE √e + 2u|x|
    the tensor       Σ error² <= NORM² Σ (e + u²x²) + SINGLE² max over rows of the row's (e + u²x²)

The first catches what is wrong in one place, the second what is a little wrong everywhere; its last
term lets the statistics of few rows fluctuate. Correct kernels use 0.2 to 0.8 of the first and 0.1
to 0.6 of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..impl import KernelBackend
from .cases import CASES, Batch, Case
from .oracle import dense, differentiate, run_kernels, run_public
from .rounding import model, stored

SINGLE = 8.0  # standard deviations that one number may be off
NORM = 1.5  # and the norm of a tensor, beyond what one row may be off
ORACLE = 4.0  # in float64 the oracle errs as well, and cancels more
UNDERFLOW = 1e-150  # the squares of smaller numbers are 0


def budget(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """The variance of every result before it is stored, see ``rounding.model``."""
    return {name: variance for name, (_, variance) in model(batch, dtype).items()}


def shares(found: Tensor, exact: Tensor, variance: Tensor) -> Tensor:
    """The error of each number over what is allowed; arguments as of ``measure``."""
    error = (found.double() - exact).abs()
    last = stored(exact, found.dtype)  # a rounding is off by up to twice its root mean square
    allowed = SINGLE * variance.sqrt() + 2 * last.sqrt() + UNDERFLOW
    scale = ORACLE if found.dtype == torch.float64 else 1.0
    return torch.where(error > 0, error / allowed, 0.0) / scale


def measure(found: Tensor, exact: Tensor, variance: Tensor) -> tuple[float, float]:
    """The worst error of a number and the norm of the errors, both over what is allowed.

    exact and variance in float64, finite.
    """
    error = (found.double() - exact).abs()
    single = shares(found, exact, variance).max().item()
    scale = ORACLE if found.dtype == torch.float64 else 1.0
    spread = variance + stored(exact, found.dtype)
    rows = spread.flatten(1).sum(1) if spread.dim() > 1 else spread
    norm = (NORM**2 * spread.sum() + SINGLE**2 * rows.max()).sqrt().item()
    return single, error.norm().item() / (scale * norm) if norm else single


def violations(
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    variances: dict[str, Tensor],
    slack: float = 1.0,
) -> list[str]:
    """What is wrong with a result, one line per tensor; empty when it is inside the budget.

    exact: the float64 oracle; variances: ``budget``; slack: a factor on it.
    """
    lines = []
    for name, truth in exact.items():
        x, reference = found[name].detach().cpu(), truth.detach().double().cpu()
        if x.shape != reference.shape:
            lines.append(f"{name}: shape {tuple(x.shape)}, expected {tuple(reference.shape)}")
            continue
        good = reference.isfinite()
        if not torch.equal(x.isfinite(), good) or not torch.equal(
            x[~good].double(), reference[~good]
        ):
            lines.append(f"{name}: not finite in other places than the oracle")
            continue
        if x.numel() == 0:
            continue
        rest = [torch.where(good, y, 0.0).to(y.dtype) for y in (x, reference, variances[name])]
        single, norm = measure(*rest)
        if single > slack:
            lines.append(f"{name}: a number is off by {single:.3g} times its budget")
        if norm > slack:
            lines.append(f"{name}: Frobenius error is {norm:.3g} times its budget")
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
    batch = case.make(dtype, device)  # anew: run may have written into its inputs
    exact = differentiate(lambda x: dense(batch, torch.float64, x), batch, torch.float64)
    lines = violations(found, exact, budget(batch, dtype), slack)
    if lines:
        raise AssertionError(f"{case.name}, {dtype}: " + "; ".join(lines))


def check_backend(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cases: Iterable[Case] = CASES,
) -> None:
    """Judges a backend by name on all cases and both index types, through the public functions.

    Examples:
        >>> check_backend("reference", cases=[CASES[0]])
    """
    for case in cases:
        judge(case, dtype, lambda batch: run_public(batch, name), device)
    judge(
        replace(CASES[0], index=torch.int32), dtype, lambda batch: run_public(batch, name), device
    )


def check_kernels(
    kernels: KernelBackend,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cases: Iterable[Case] = CASES,
) -> None:
    """Judges the three passes of a kernel backend on all cases.

    Examples:
        >>> from attnpool_kernels import impl
        >>> check_kernels(impl.load("cpu"), cases=[CASES[0]])
    """
    for case in cases:
        judge(case, dtype, lambda batch: run_kernels(batch, kernels), device)
