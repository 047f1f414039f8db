"""What a backend needs of a call, as data, and the reasons against a call that follow from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, util
from typing import Any

import torch

from ..problem import Problem

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Needs:
    """The calls that a backend serves.

    refused: what it has not, by the name of the fact in ``Problem`` ("key_bias", "dropout",
    "return_lse", "deterministic"), each with the reason.
    """

    devices: tuple[str, ...] = ()  # (): any
    dtypes: tuple[torch.dtype, ...] = FLOATS
    widest: int | None = None  # head and value dimension; None: any
    capability: tuple[int, int] = (0, 0)  # oldest of a CUDA device
    order: int = 2  # highest derivative
    refused: Mapping[str, str] = field(default_factory=dict)

    def reasons(self, problem: Problem) -> list[str]:
        """Everything that these needs say against a call."""
        found = []
        if self.devices and problem.device not in self.devices:
            found.append(f"tensors on {problem.device}: needs {_either(self.devices)}")
        if problem.capability is not None and problem.capability < self.capability:
            own, oldest = ("sm_{}{}".format(*x) for x in (problem.capability, self.capability))
            found.append(f"device is {own}: needs {oldest} or newer")
        if problem.dtype not in self.dtypes:
            found.append(f"{_short(problem.dtype)}: needs {_either(map(_short, self.dtypes))}")
        for name, width in (("head", problem.head_dim), ("value", problem.value_dim)):
            if self.widest is not None and not 1 <= width <= self.widest:
                found.append(f"{name} dimension {width}: needs 1 to {self.widest}")
        for fact, reason in self.refused.items():
            if getattr(problem, fact):
                found.append(f"{fact}: {reason}")
        if problem.grad_order > self.order:
            highest = {1: "first derivative only", 2: "derivatives to second order only"}
            found.append(
                f"{highest[self.order]}, inputs require grad (grad_order={problem.grad_order})"
            )
        return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _either(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


@cache
def find(module: str, attribute: str) -> tuple[Any, str]:
    """An attribute of an optional module and "", or None and the reason why it is missing."""
    try:
        return getattr(import_module(module), attribute), ""
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return None, f"{error.name} is not installed"
        return None, f"{module} cannot be imported: {error}"
    except Exception as error:  # a binary for another torch raises anything
        return None, f"{module}.{attribute} cannot be imported: {type(error).__name__}: {error}"


def missing(package: str) -> str:
    """Why a package cannot be there, seen without importing it; "" where it may be."""
    try:
        there = package in sys.modules or util.find_spec(package) is not None
    except (ImportError, ValueError):
        there = False
    return "" if there else f"{package} is not installed"
