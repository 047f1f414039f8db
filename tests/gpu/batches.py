"""Batches that the evidence is made of, beyond ``testing.CASES``, by name."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from attnpool_kernels import testing
from attnpool_kernels.testing import Batch

from .case import Outcome

# Long molecules and keys of few seeds in parts have kernels of their own.
SCHEDULES = (
    testing.Case("long molecules", (300, 18, 255, 256), heads=2, dim=32, lse=True),
    testing.Case("parts of seeds", (600, 18, 0, 513), heads=2, dim=32, seeds=4, lse=True),
    testing.Case(
        "parts and options",
        (600, 18),
        heads=2,
        seeds=3,
        bias="pair",
        key_bias="float32",
        dropout=0.3,
    ),
    testing.Case("key bias of long molecules", (300, 18), heads=2, dim=32, key_bias="pair"),
    testing.Case("dimension 128", (33, 18, 70), heads=2, dim=128, lse=True),
    testing.Case("seeds, dimension 128", (33, 18, 70), heads=2, dim=128, seeds=4, lse=True),
)
# What Triton's interpreter can bear: a second a pass.
SMALLEST = (
    testing.Case("smallest", (3, 0, 2), heads=1, dim=16, lse=True),
    testing.Case("smallest of seeds", (3, 0, 2), heads=1, dim=16, seeds=2, key_bias="pair"),
)
TINY = ("molecules", "empty among them", "four seeds", "bias", "dropout")
CASES = {case.name: case for case in (*testing.CASES, *SCHEDULES, *SMALLEST)}
TENSORS = ("q", "k", "v", "key_bias", "dout", "dlse", "ddq", "ddk", "ddv", "ddkey_bias")


def positive(batch: Batch) -> Batch:
    """Nothing cancels: what a sum loses at each step adds up."""
    return replace(batch, **{name: x.abs() for name, x in _tensors(batch)})


def of_a_sum(batch: Batch) -> Batch:
    """The gradients that ``sum()`` sends back: one number with stride 0 everywhere."""
    names = ("dout", "ddq", "ddk", "ddv")
    ones = {
        name: getattr(batch, name).new_ones(()).expand_as(getattr(batch, name)) for name in names
    }
    return replace(batch, **ones)


SPECIAL: dict[str, tuple[testing.Case, Callable[[Batch], Batch]]] = {
    "positive": (replace(CASES["dimension 128"], logits=0.3), positive),
    "positive seeds": (replace(CASES["seeds, dimension 128"], logits=0.3), positive),
    "positive, dimension 32": (
        testing.Case("", (18, 64, 130), dim=32, lse=True, logits=0.3),
        positive,
    ),
    "gradients of a sum": (testing.Case("", (18, 23, 0, 65), dim=32), of_a_sum),
    "gradients of a sum, seeds": (testing.Case("", (18, 23, 0, 65), dim=32, seeds=4), of_a_sum),
}

# Which axis of [rows, heads, width] is so far apart that offsets within it pass 2^32 elements.
FAR = {"far rows": 0, "far heads": 1, "far width": 2}
FAR_SHAPE = testing.Case("", (18, 0, 15), heads=5, dim=16)
SLOT = 1024  # elements between the tensors, which lie in one storage


def far(name: str, dtype: torch.dtype, device: str, size: int) -> Batch:
    """A batch whose tensors are views over about ``size`` elements of one storage."""
    seeds = 4 if name.endswith("of seeds") else None
    axis = FAR[name.removesuffix(" of seeds")]
    batch = replace(FAR_SHAPE, seeds=seeds).make(dtype, device)
    length = max(x.shape[axis] for _, x in _tensors(batch) if x.dim() == 3)
    step = size // max(1, length - 1)
    wanted = [(key, x) for key, x in _tensors(batch) if x.dim() == 3 and x.dtype == dtype]
    if step < SLOT * len(wanted):
        raise ValueError(f"{name}: {size} elements are too few to keep the tensors apart")
    total = step * (length - 1) + SLOT * (len(wanted) + 1)
    require_memory(total * dtype.itemsize, device)
    storage = torch.empty(total, dtype=dtype, device=device)
    views = {}
    for place, (key, x) in enumerate(wanted):
        inner = [n for i, n in enumerate(x.shape) if i != axis]
        strides = [inner[1], 1]
        strides.insert(axis, step)
        view = storage.as_strided(x.shape, strides, place * SLOT)
        views[key] = view.copy_(x)
    return replace(batch, **views)


def require_memory(need: int, device: str) -> None:
    """Ends the case as "missing" where the GPU has less than ``need`` bytes, and a tenth, free."""
    if device != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 1.1 * need:
        text = f"needs {1.1 * need / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
        raise Outcome("missing", text)


@contextmanager
def memory_to_itself(folder: Path) -> Iterator[None]:
    """Waits for other processes that need most of the GPU's memory; a killed one waits for none."""
    with open(folder / "memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(name: str, dtype: torch.dtype, device: str) -> Batch:
    if name in SPECIAL:
        case, change = SPECIAL[name]
        return change(replace(case, name=name).make(dtype, device))
    if name.startswith("far "):
        return far(name, dtype, device, 2**32 if device == "cuda" else 2**18)
    return CASES[name].make(dtype, device)


def mixed(dtype: torch.dtype, device: str, seeds: int | None = None, small: bool = False) -> Batch:
    """Every size class of molecules in one batch; small: what an interpreter can bear.

    Seeds have a key bias; with one, sets would have no tiles of long molecules.
    """
    counts = (3, 0, 2) if small else (18, 0, 33, 1, 64, 17, 130, 700)
    case = testing.Case("mixed", counts, heads=1 if small else 4, dim=32, seeds=seeds, lse=True)
    return replace(case, key_bias="pair" if seeds else None).make(dtype, device)


def on_cpu(batch: Batch) -> Batch:
    return _moved(batch, "cpu")


def on_device(batch: Batch, device: str) -> Batch:
    """Copies that the driver makes, without a kernel: tools that watch kernels know what is set."""
    return _moved(batch, device)


def _moved(batch: Batch, device: str) -> Batch:
    moved = {}
    for field in fields(batch):
        x = getattr(batch, field.name)
        if isinstance(x, torch.Tensor):
            moved[field.name] = x.to(device)
    if batch.q_ptr is batch.k_ptr:
        moved["q_ptr"] = moved["k_ptr"]
    return replace(batch, **moved)


def _tensors(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    return [(key, getattr(batch, key)) for key in TENSORS if getattr(batch, key) is not None]
