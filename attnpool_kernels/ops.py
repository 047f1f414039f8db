"""The registered operators: schemas, shapes without data, and who runs them.

``torch.ops.attnpool.{attention, attention_backward, attention_double_backward}`` are the three
passes in C++: the compiled library defines them and registers its CPU and CUDA kernels, so that a
program without Python finds them, too. ``torch.ops.attnpool_triton`` holds the same three for
Triton, defined here. ``autograd`` registers the derivative of each with the dispatcher. A saved
graph names its operators, so the choice of a backend is a constant in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor

from .impl import KernelBackend, library, load
from .operands import (
    Cotangents,
    Gradients,
    Operands,
    Options,
    Result,
    SecondGradients,
    Tangents,
    accumulator,
    split,
)


class Passes(NamedTuple):
    """The three passes as functions of flat arguments."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    double_backward: Callable[..., tuple[Tensor, ...]]


class Signature(NamedTuple):
    """What a pass takes and gives: the fields of these tuples one by one, then the flags."""

    operator: str
    takes: tuple[type, ...]
    gives: type
    flags: tuple[str, ...] = ()

    def schema(self) -> str:
        """The schema of the registered operator, as csrc/library.cpp spells it."""
        types = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float"}
        fields = [item for kind in self.takes for item in get_type_hints(kind).items()]
        arguments = [f"{types[hint]} {name}" for name, hint in fields]
        arguments += [f"bool {name}" for name in self.flags]
        results = ", ".join(["Tensor"] * len(get_type_hints(self.gives)))
        return f"{self.operator}({', '.join(arguments)}) -> ({results})"


SIGNATURES = {
    "forward": Signature("attention", (Operands, Options), Result),
    "backward": Signature(
        "attention_backward",
        (Operands, Result, Cotangents, Options),
        Gradients,
        flags=("need_dbias",),
    ),
    "double_backward": Signature(
        "attention_double_backward",
        (Operands, Result, Cotangents, Tangents, Options),
        SecondGradients,
    ),
}


def _fake_forward(x: Operands, options: Options) -> Result:
    rows = (*x.rows, x.q.shape[1])
    out = x.q.new_empty((*rows, x.v.shape[2]))
    return Result(out, x.q.new_empty(rows, dtype=accumulator(x.q.dtype)))


def _fake_biases(x: Operands, wanted: bool) -> tuple[Tensor, Tensor]:
    def like(given: Tensor | None, wanted: bool) -> Tensor:
        if given is None:
            return x.q.new_empty((0, x.q.shape[1]))
        return given.new_empty(given.shape if wanted else (0, given.shape[1]))

    return like(x.bias, wanted), like(x.key_bias, True)


def _fake_backward(
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    dq, dk, dv = (rows.new_empty(rows.shape) for rows in x[:3])
    return Gradients(dq, dk, dv, *_fake_biases(x, need_dbias))


def _fake_double_backward(
    x: Operands, y: Result, dy: Cotangents, tangents: Tangents, options: Options
) -> SecondGradients:
    gq, gk, gv = (rows.new_empty(rows.shape) for rows in x[:3])
    gout, glse = (rows.new_empty(rows.shape) for rows in y)
    return SecondGradients(gq, gk, gv, *_fake_biases(x, True), gout, glse)


_FAKES = Passes(_fake_forward, _fake_backward, _fake_double_backward)
PASSES: dict[str, Passes] = {}  # by namespace, as the dispatcher has them
_libraries: list[torch.library.Library] = []


def library_of(namespace: str, kind: str = "FRAGMENT") -> torch.library.Library:
    """A handle on a namespace, kept: what it registers lasts no longer than itself."""
    _libraries.append(torch.library.Library(namespace, kind))
    return _libraries[-1]


def define(namespace: str, kernels: Callable[[], KernelBackend]) -> None:
    """Defines the three operators in Python, for CPU and CUDA tensors, on these kernels."""
    own = library_of(namespace, "DEF")

    def runs(name: str, signature: Signature) -> Callable[..., tuple[Tensor, ...]]:
        def run(*flat: Any) -> tuple[Tensor, ...]:
            return tuple(getattr(kernels(), name)(*split(flat, *signature.takes)))

        return run

    for name, signature in SIGNATURES.items():
        own.define(signature.schema())
        for key in ("CPU", "CUDA"):
            own.impl(signature.operator, runs(name, signature), key)
    adopt(namespace)


def adopt(namespace: str) -> None:
    """Gives the operators of a namespace their shapes without data, and enters them here."""
    own = library_of(namespace)

    def shapes(fake: Callable, takes: tuple[type, ...]) -> Callable[..., tuple[Tensor, ...]]:
        def run(*flat: Any) -> tuple[Tensor, ...]:
            if len({x.device for x in flat if isinstance(x, Tensor)}) > 1:
                raise RuntimeError(f"{namespace}: all tensors must be on the device of q")
            return tuple(fake(*split(flat, *takes)))

        return run

    for (_, signature), fake in zip(SIGNATURES.items(), _FAKES):
        torch.library.register_fake(
            f"{namespace}::{signature.operator}", shapes(fake, signature.takes), lib=own
        )
    operators = getattr(torch.ops, namespace)
    PASSES[namespace] = Passes(
        *(getattr(operators, signature.operator).default for signature in SIGNATURES.values())
    )


if not library.load_cpu():
    library.load_cuda()
    adopt(library.OPERATORS)
define("attnpool_triton", lambda: cast(KernelBackend, load("triton")))
