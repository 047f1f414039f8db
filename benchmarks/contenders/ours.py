"""The backends of this package as contenders, ``attnpool:<name>``."""

from __future__ import annotations

import torch

import attnpool_kernels
from attnpool_kernels import dispatch

from ..workloads.batch import WorkloadBatch
from ..workloads.workload import PASSES, Workload
from .attention import sdpa_choice
from .contender import Call, Contender
from .packages import version


def backend(name: str) -> Contender:
    """A backend by its name; native kernels are "ours", adapters of other libraries are not."""

    def problem(work: Workload, what: str, device: str) -> dispatch.Problem:
        on_gpu = device == "cuda" and torch.cuda.is_available()
        return dispatch.Problem(
            device=device,
            dtype=work.dtype,
            head_dim=work.dim,
            value_dim=work.dim,
            capability=torch.cuda.get_device_capability() if on_gpu else None,
            seeds=work.seeds,
            key_bias=work.key_bias,
            grad_order=PASSES.index(what),
        )

    def why_not(work: Workload, what: str, device: str) -> list[str]:
        return attnpool_kernels.impl.load(name).why_not(problem(work, what, device))

    def prepare(batch: WorkloadBatch) -> Call:
        molecules = attnpool_kernels.Ragged.from_ptr(batch.ptr)
        if batch.workload.seeds is not None:
            pool = attnpool_kernels.seed_pool
            return lambda seeds, k, v, key_bias=None: pool(
                seeds, k, v, molecules, key_bias=key_bias, backend=name
            )
        attend = attnpool_kernels.set_attention
        return lambda q, k, v, key_bias=None: attend(
            q, k, v, molecules, key_bias=key_bias, backend=name
        )

    def kernel(work: Workload, device: str) -> str:
        details = _details(name, work, device)
        return f"attnpool_kernels {attnpool_kernels.__version__} {name} ({details})"

    native = attnpool_kernels.impl.load(name).KIND == "kernel"
    return Contender(
        f"attnpool:{name}",
        f"attnpool {name}",
        prepare,
        why_not,
        kernel,
        ours=native,
        key_bias=True,
    )


def _details(name: str, work: Workload, device: str) -> str:
    """What is behind one of our backends: compiler and vector width, or the library it adapts."""
    module = attnpool_kernels.impl.load(name)
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
        chosen = sdpa_choice(work, device, max(work.sizes), masked=True)
        return f"torch {torch.__version__}: scaled_dot_product_attention, {chosen}"
    return f"torch {torch.__version__}"
