"""A result of a device against the float64 oracle on the CPU, as a row of evidence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnpool_kernels import testing
from attnpool_kernels.testing import Batch

from . import batches


def judged(batch: Batch, found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """The row of a result: the error of every tensor in it, and how much of its budget that is."""
    host = batches.on_cpu(batch)
    found = {name: x.detach().cpu() for name, x in found.items()}
    exact = oracle(host)
    unknown = set(found) - set(exact)
    if unknown:
        raise ValueError(f"the oracle knows no {', '.join(sorted(unknown))}")
    exact = {name: x for name, x in exact.items() if name in found}
    lines, shares = _verdict(host, found, exact, dtype)
    row: dict[str, Any] = {"status": "wrong" if lines else "ok", "shape": list(batch.q.shape)}
    row["error"] = {name: _error(found[name], x) for name, x in exact.items()}
    row["of_budget"] = shares
    return row | ({"text": "; ".join(lines)} if lines else {})


def oracle(batch: Batch) -> dict[str, Tensor]:
    """All results in float64, computed on the CPU."""
    host, exact = batches.on_cpu(batch), torch.float64
    return testing.differentiate(lambda x: testing.dense(host, exact, x), host, exact)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what torch allocates with NaN, so that a number that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _error(found: Tensor, exact: Tensor) -> float:
    """The worst of the numbers that are finite in both."""
    if found.shape != exact.shape:
        return float("inf")
    error = (found.double() - exact.double()).abs()
    return torch.where(error.isfinite(), error, 0.0).max().item() if error.numel() else 0.0


def _verdict(
    host: Batch, found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> tuple[list[str], dict[str, float]]:
    """What is wrong, and the share of its budget that each tensor uses."""
    variances = testing.budget(host, dtype)
    shares = {}
    for name, x in exact.items():
        good = x.isfinite() & found[name].isfinite() if found[name].shape == x.shape else None
        if good is None or not good.numel():
            continue
        y, z = (torch.where(good, t, 0.0).to(t.dtype) for t in (found[name], x))
        shares[name] = max(testing.measure(y, z, torch.where(good, variances[name], 0.0)))
    return testing.violations(found, exact, variances), shares
