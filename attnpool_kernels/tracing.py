"""Who looks at a call: compilers, tracers, recorders, and what each of them must not see."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def unreadable(x: Tensor) -> bool:
    """True where contents cannot be read: under compilers and torch.jit.trace, fake and meta."""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta or type(x) not in PLAIN
    )


def unrecorded() -> AbstractContextManager:
    """Keeps a check of contents out of the graph that ``make_fx`` records over real tensors."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return nullcontext()
    return torch.utils._python_dispatch._disable_current_modes()


def recording() -> bool:
    """Whether ``make_fx`` (or what is built on it) records the operators that run."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def watched() -> bool:
    """Whether something above autograd has to see the operator itself."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
    )


def autocasting(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)
