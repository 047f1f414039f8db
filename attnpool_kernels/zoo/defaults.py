"""Construction that does not depend on the default dtype and the default device of the process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Makes tensors in float32 on the CPU where nothing else is said, as in a fresh process."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def made_plainly(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of a module that has the same numbers under every default dtype and device.

    Libraries round their constants to the default dtype, initialise with functions that halves do
    not have and read values back, which a meta device has not. The module is made in float32 on
    the CPU and then, as every module of torch, has the default dtype and device.
    """

    @functools.wraps(init)
    def made(self: Any, *arguments: Any, **options: Any) -> None:
        with plain_defaults():
            init(self, *arguments, **options)
        self.to(device=torch.get_default_device(), dtype=torch.get_default_dtype())

    return made
