"""Which backend serves a call, and why the others do not.

A ``Problem`` is the facts of a call without its tensors, so it can also be asked about a machine
that is not at hand. Every backend lists all its reasons against a problem; ``select`` takes the
first of ``impl.order`` with none. A backend asked for by name is used or refused, never
replaced.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from . import impl
from .impl import Backend
from .problem import Problem


class BackendError(RuntimeError):
    """The named backend cannot serve this call, or no backend can. Lists every reason.

    Examples:
        >>> from attnpool_kernels import Ragged, set_attention
        >>> x = torch.randn(4, 1, 8)
        >>> try:
        ...     set_attention(x, x, x, Ragged.from_counts([4]), backend="flash_attn")
        ... except BackendError as error:
        ...     print(str(error)[:27])
        backend 'flash_attn' cannot
    """


def backends() -> tuple[str, ...]:
    """The names of all backends, in the order of the automatic choice.

    Examples:
        >>> backends()[:3]
        ('cpu', 'triton', 'cuda')
    """
    return impl.PRIORITY


_chosen: dict[tuple[Problem, str | None], Backend] = {}


def select(problem: Problem, name: str | None = None) -> Backend:
    """The backend for a problem: the named one, or the first without a reason against it.

    Raises ValueError for an unknown name, TypeError for a name that is no string and BackendError
    where the backend, or every backend, has a reason.
    """
    if torch.compiler.is_compiling():
        # Sizes may be symbols here. What counts is whether the native kernels cover them: literals
        # in a comparison, which becomes a guard of the graph.
        facts = dict(
            device=problem.device,
            dtype=problem.dtype,
            head_dim=_bracket(problem.head_dim),
            value_dim=_bracket(problem.value_dim),
            capability=problem.capability,
            seeds=None if problem.seeds is None else 1,
            bias=problem.bias,
            key_bias=problem.key_bias,
            dropout=problem.dropout,
            grad_order=problem.grad_order,
            deterministic=problem.deterministic,
            return_lse=problem.return_lse,
        )
        return impl.load(_select_once(name, **facts))
    if not isinstance(problem.head_dim + problem.value_dim + (problem.seeds or 0), int):
        return _select(problem, name)  # symbols of a tracer have no hash
    key = (problem, name)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _select(problem, name)
    return found


def _bracket(width: int) -> int:
    """The least of the widths that a native backend ends at (``NEEDS.widest``) that is enough."""
    if width <= 128:
        return 128
    if width <= 256:
        return 256
    return 512 if width <= 512 else 513


def _select_once(name: str | None, **facts) -> str:
    """``_select`` for a compiler, which calls it while tracing and keeps the name as a constant.

    Backends look at installed packages and built libraries, which is nothing to trace.
    """
    return impl.name_of(_select(Problem(**facts), name))


# What torch.compiler.assume_constant_result sets; that call would import the whole compiler.
_select_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _select(problem: Problem, name: str | None) -> Backend:
    if name is None:
        for candidate in impl.order(problem):
            module = impl.load(candidate)
            if not module.why_not(problem):
                return module
        raise BackendError(f"no backend can serve this call\n{table(problem)}")
    check_name(name)
    module = impl.load(name)
    reasons = module.why_not(problem)
    if reasons:
        raise BackendError(
            f"backend {name!r} cannot serve this call: {'; '.join(reasons)}\n{table(problem)}"
        )
    return module


def check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str or None, got {type(name).__name__}")
    if name not in impl.PRIORITY:
        known = ", ".join(impl.PRIORITY)
        raise ValueError(f"backend must be one of {known}, got {name!r}")


def table(problem: Problem) -> str:
    """One line per backend: chosen (*), able (+), or all reasons why not (-)."""
    facts = [f"{f.name}={getattr(problem, f.name)}" for f in fields(problem)[2:]]
    facts = [fact for fact in facts if not fact.endswith(("=None", "=False", "=0"))]
    lines, chosen = [f"{problem.dtype} on {problem.device}, {', '.join(facts)}"], False
    order = impl.order(problem)
    width, moved = max(map(len, order)), order != impl.PRIORITY
    for name in order:
        reasons = impl.load(name).why_not(problem)
        if reasons:
            mark, text = "-", ";  ".join(reasons)
        else:
            mark, text = ("+", "can serve") if chosen else ("*", "chosen")
            if moved and name == "cuda":
                text += ";  before triton, because the sets are small"
            chosen = True
        lines.append(f"{name:<{width}}  {mark}  {text}")
    return "\n".join(lines)
