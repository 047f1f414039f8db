"""Runs the Triton backend's compiled PTX on CPU tensors, in the simulator of tests/tools/ptx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from . import aot, ptx


@contextlib.contextmanager
def simulated(
    architecture: int, row: str, schedule: str = "block", seed: int = 0, **changes: int
) -> Iterator[list[str]]:
    """Inside, the backend's three functions compile for an architecture and run simulated.

    changes: to the entries of the tile table, as smaller tiles are simulated faster.
    Yields a list that names every kernel that ran, with its number of instructions.
    """
    ran: list[str] = []

    def call(launch: aot.Launch) -> None:
        compiled = launch.compile(architecture)
        kernel = ptx.Kernel(compiled.asm["ptx"])
        arguments = list(passed(launch))
        buffers = [x for x in arguments if isinstance(x, torch.Tensor)]
        arguments += [0] * (len(kernel.params) - len(arguments))  # Triton's scratch pointers
        threads = launch.options.get("num_warps", 4) * 32
        steps = ptx.launch(
            kernel,
            launch.grid,
            threads,
            arguments,
            buffers,
            compiled.metadata.shared,
            schedule,
            seed,
        )
        ran.append(f"{launch.name}: {steps}")

    with aot.as_device(divmod(architecture, 10), row, **changes), aot.on_launch(call):
        yield ran


def passed(launch: aot.Launch) -> Iterator:
    """The arguments that stay after specialisation, tuples flattened."""
    constants = launch.source().constants

    def walk(value, path):
        if path in constants:
            return
        if isinstance(value, tuple):
            for i, x in enumerate(value):
                yield from walk(x, (*path, i))
        else:
            yield value

    for param in launch.kernel.params:
        yield from walk(launch.arguments[param.name], (param.num,))
