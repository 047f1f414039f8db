"""The contenders by name: what can run where, how to call it, and which kernel of which version.

Every backend of ``attnpool_kernels.backends()`` is here as ``attnpool:<name>``; one that cannot
serve gives a row with its reasons. Optional packages are imported only when a contender that needs
them is asked.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import attnpool_kernels
from attnpool_kernels import dispatch

from . import baselines
from .cases import PASSES, Batch, Workload

# Traces for seconds in every fresh process, which no suite has the time for on a CPU.
SLOW_TO_START = ("attnpool:flex",)

Reasons = Callable[[Workload, str, str], list[str]]


@dataclass(frozen=True)
class Contender:
    """why_not(workload, pass, device) lists every reason; kernel(workload, device): what runs."""

    name: str
    title: str
    prepare: Callable[[Batch], Callable[..., Tensor]]
    why_not: Reasons
    kernel: Callable[[Workload, str], str]
    ours: bool = False
    module: bool = False


def _fits(order: int = 2, devices: tuple[str, ...] = ("cpu", "cuda")) -> Reasons:
    def why_not(work: Workload, what: str, device: str) -> list[str]:
        reasons = []
        if PASSES.index(what) > order:
            reasons.append("torch has no second derivative of this kernel")
        if device not in devices:
            reasons.append(f"needs {' or '.join(devices)}, the device is {device}")
        return reasons

    return why_not


def _flash_why_not(work: Workload, what: str, device: str) -> list[str]:
    reasons = _fits(1)(work, what, device)
    if device == "cuda":
        if work.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"{_short(work.dtype)}: the CUDA kernel needs float16 or bfloat16")
        if len(set(work.sizes)) > 1:
            reasons.append("molecules differ in size: the CUDA kernel takes no mask")
    return reasons


def _nested_why_not(work: Workload, what: str, device: str) -> list[str]:
    # The only kernel for jagged tensors on the CPU is torch's math path, one order of derivative.
    return _fits(1)(work, what, device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _blas() -> str:
    return "MKL" if torch.backends.mkl.is_available() else "BLAS"


def _plain(formula: str) -> Callable[[Workload, str], str]:
    def kernel(work: Workload, device: str) -> str:
        library = _blas() if device == "cpu" else f"cuBLAS of CUDA {torch.version.cuda}"
        return f"torch {torch.__version__}: {formula} ({library})"

    return kernel


def _flash_kernel(work: Workload, device: str) -> str:
    name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if device == "cpu" else "")
    return f"torch {torch.__version__}: aten::{name}"


def _loop_kernel(work: Workload, device: str) -> str:
    n = work.sizes[0]
    return f"torch {torch.__version__}: scaled_dot_product_attention ({_chosen(work, device, n)})"


def _chosen(work: Workload, device: str, n: int, masked: bool = False) -> str:
    """Which kernel torch's scaled_dot_product_attention takes for molecules of n atoms."""
    x = torch.zeros(1, work.heads, n, work.dim, dtype=work.dtype, device=device)
    q = x if work.seeds is None else x[:, :, :1].expand(-1, -1, work.seeds, -1)
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool, device=device) if masked else None
    try:
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, x, x, mask)).name
    except (AttributeError, RuntimeError, ValueError):
        return "its choice"


def _nested_kernel(work: Workload, device: str) -> str:
    return f"torch {torch.__version__}: scaled_dot_product_attention of a jagged NestedTensor"


def _ours(name: str) -> Contender:
    def problem(work: Workload, what: str, device: str) -> dispatch.Problem:
        on_gpu = device == "cuda" and torch.cuda.is_available()
        return dispatch.Problem(
            device=device, dtype=work.dtype, head_dim=work.dim, value_dim=work.dim,
            capability=torch.cuda.get_device_capability() if on_gpu else None,
            seeds=work.seeds, grad_order=PASSES.index(what),
        )  # fmt: skip

    def why_not(work: Workload, what: str, device: str) -> list[str]:
        return attnpool_kernels.backends.load(name).why_not(problem(work, what, device))

    def prepare(batch: Batch) -> Callable[..., Tensor]:
        molecules = attnpool_kernels.Ragged.from_ptr(batch.ptr)
        if batch.workload.seeds is not None:
            pool = attnpool_kernels.seed_pool
            return lambda seeds, k, v: pool(seeds, k, v, molecules, backend=name)
        attend = attnpool_kernels.set_attention
        return lambda q, k, v: attend(q, k, v, molecules, backend=name)

    def kernel(work: Workload, device: str) -> str:
        version = attnpool_kernels.__version__
        return f"attnpool_kernels {version} {name} ({_details(name, work, device)})"

    native = attnpool_kernels.backends.load(name).KIND == "kernel"
    return Contender(f"attnpool:{name}", f"attnpool {name}", prepare, why_not, kernel, ours=native)


def _details(name: str, work: Workload, device: str) -> str:
    """What is behind one of our backends: compiler and vector width, or the library it adapts."""
    module = attnpool_kernels.backends.load(name)
    if name in ("cpu", "cuda"):
        missing = module.load()  # build_info is there once the library is
        return (missing and "not loaded") or torch.ops.attnpool.build_info()
    if name == "flash_attn":
        capability = torch.cuda.get_device_capability() if device == "cuda" else None
        major = module.load(capability, work.dim)[0]
        packages = {2: "flash_attn", 3: "flash_attn_3", 4: "flash_attn_4"}
        return f"flash_attn {version(packages[major]) or major}" if major else "not installed"
    if name in ("triton", "xformers"):
        return f"{name} {version(name) or 'not installed'}"
    if name == "sdpa":
        chosen = _chosen(work, device, max(work.sizes), masked=True)
        return f"torch {torch.__version__}: scaled_dot_product_attention, {chosen}"
    return f"torch {torch.__version__}"


def version(package: str) -> str:
    """Installed version of a package, or "" where it is not there. Imports nothing."""
    for name in (package, package.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _table() -> dict[str, Contender]:
    found = [_ours(name) for name in attnpool_kernels.backends()]
    found += [
        Contender("naive", "naive, padded", baselines.naive, _fits(),
                  _plain("matmul, softmax, matmul")),
        Contender("memory_efficient", "chunked (Rabe & Staats)", baselines.chunked, _fits(),
                  _plain("matmul in blocks of 1024 x 1024, checkpoint")),
        Contender("flash", "flash (torch SDPA, padded)", baselines.flash, _flash_why_not,
                  _flash_kernel),
        Contender("efficient", "memory-efficient (torch SDPA, padded)", baselines.efficient,
                  _fits(1, ("cuda",)),
                  lambda work, device: f"torch {torch.__version__}: "
                  "aten::_scaled_dot_product_efficient_attention"),
        Contender("per_molecule", "torch SDPA per molecule", baselines.per_molecule, _fits(1),
                  _loop_kernel),
        Contender("nested", "NestedTensor SDPA", baselines.nested, _nested_why_not,
                  _nested_kernel),
        Contender("einsum", "padded einsum (as DGL)", baselines.einsum, _fits(),
                  _plain("einsum, softmax, einsum")),
    ]  # fmt: skip
    from .modules import CONTENDERS as modules

    return {contender.name: contender for contender in (*found, *modules)}


CONTENDERS: dict[str, Contender] = _table()


@cache
def _native() -> bool:
    """Whether a kernel of ours runs here; without one, plain torch stands for this package."""
    work = Workload("any", "any", (1,))
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    ours = [contender for contender in CONTENDERS.values() if contender.ours]
    return any(not c.why_not(work, "forward", device) for c in ours for device in devices)


def for_workload(work: Workload, names: list[str] | None = None) -> list[Contender]:
    """The contenders of a workload (operator or module), in the order of the registry."""
    without = work.without if names is None and _native() else ()
    return [
        contender
        for contender in CONTENDERS.values()
        if contender.module == work.module
        and (names is None or contender.name in names)
        and (work.rivals or contender.ours)
        and contender.name not in without
    ]
