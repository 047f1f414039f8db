"""Checks of arguments: each raises by name, with what it got and what it expects.

TypeError for the wrong kind, ValueError for a value that cannot be.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..ragged import Ragged
from ..tracing import autocasting


def positive(name: str, value: object) -> int:
    return integer(name, value, 1)


def integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value}")
    return value


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def probability(name: str, value: object) -> float:
    value = number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def one_of(name: str, value: object, known: tuple) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def widths_of(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise TypeError(f"{name} must be a tuple of int, got {type(values).__name__}")
    return tuple(positive(name, value) for value in values)


def module_or_none(name: str, value: object, required: bool = False) -> None:
    if not isinstance(value, torch.nn.Module) and (required or value is not None):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def check_rows(name: str, x: object, width: int | None, like: Tensor | None = None) -> None:
    """Raises where x is no floating-point [N, width] tensor of the dtype of ``like``, a parameter,
    or of a layout or a dtype of 8 bits that no layer serves (NotImplementedError).

    Under autocast the dtypes may differ.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 2 or (width is not None and x.shape[1] != width):
        wanted = "C" if width is None else width
        raise ValueError(f"{name} must have shape [N, {wanted}], got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested or x.dtype.itemsize < 2:
        raise NotImplementedError(
            f"{name} must be a dense tensor of at least 16 bits, got {x.dtype}, {x.layout}"
        )
    if like is not None and x.dtype != like.dtype and not autocasting(x.device.type):
        raise TypeError(
            f"{name} must have the dtype of the module's parameters, {like.dtype}, got {x.dtype}"
        )
    refuse_trace()


def refuse_trace() -> None:
    """Raises under ``torch.jit.trace``, whose graph would keep the boundaries of one batch."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace would keep the boundaries of this batch; use torch.export"
        )


class Covered(Ragged):
    """Boundaries of rows that ``covered`` has seen: whoever gets them need not look again."""

    __slots__ = ()


def covered(x: Tensor, ptr: Tensor | Ragged, name: str = "ptr") -> tuple[Tensor, Ragged]:
    """The rows that belong to a molecule; zeros for the others where reading ptr would wait.

    Whatever the rows of no molecule hold, layers before the operator would carry it into the
    gradients of their weights: 0 · NaN is NaN.
    """
    if isinstance(ptr, Covered):
        return x, ptr
    ragged = ptr if isinstance(ptr, Ragged) else Ragged(ptr)
    found = object.__new__(Covered)
    found.ptr, found.last, found.kept = ragged.ptr, ragged.last, ragged.kept
    last, rows = ragged.last, x.shape[0]  # last is None where it is not known
    if last is None:
        return x.masked_fill(_outside(x, ragged), 0.0), found
    if last > rows:
        raise ValueError(f"{name}[-1] must be at most the number of rows, {rows}, got {last}")
    return x if last == rows else x[:last], found


def uncovered(x: Tensor, rows: int, given: object, ragged: Ragged) -> Tensor:
    """The results of rows that were ``covered``, among 0 for the other ones of ``rows``."""
    if isinstance(given, Covered):
        return x
    if ragged.last is None:
        return x.masked_fill(_outside(x, ragged), 0.0)
    return x if ragged.last == rows else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))


def _outside(x: Tensor, ragged: Ragged) -> Tensor:
    """[N, 1], whether a row is of no molecule."""
    rows = torch.arange(x.shape[0], device=x.device)
    return (rows >= ragged.ptr[-1].to(x.device))[:, None]
