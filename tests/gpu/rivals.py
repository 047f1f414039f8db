"""What other libraries offer for the same work, called as their own documentation says.

Everything that a program computes once for a batch (boundaries as int32, the longest set, masks) is
made beforehand. Each maker takes a batch and gives ``call(q, k, v) -> out``; it raises
``case.Outcome`` where the library is not there or does not serve such a batch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders import attention
from benchmarks.contenders.padding import Padding, padded
from benchmarks.workloads.batch import WorkloadBatch

from .alone import Call
from .case import Outcome


def module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Outcome("missing", f"{name}: {error}") from error
    except Exception as error:  # a library for another torch may raise anything
        raise Outcome("missing", f"{name}: {type(error).__name__}: {error}") from error


def ours(name: str) -> Callable[[WorkloadBatch], Call]:
    def make(batch: WorkloadBatch) -> Call:
        from attnpool_kernels import Ragged, seed_pool, set_attention

        molecules = Ragged.from_ptr(batch.ptr)
        attend = set_attention if batch.workload.seeds is None else seed_pool
        return lambda q, k, v: attend(q, k, v, molecules, backend=name)

    return make


class Packed:
    """Boundaries as libraries of packed sequences want them; the seeds repeated for every set."""

    def __init__(self, batch: WorkloadBatch) -> None:
        work = batch.workload
        self.half = work.dtype in (torch.float16, torch.bfloat16)
        self.sets, self.seeds = len(work.sizes), work.seeds
        self.k_ptr, self.longest_k = batch.ptr.to(torch.int32), max(work.sizes)
        self.q_ptr, self.longest_q = self.k_ptr, self.longest_k
        self.q_counts = self.k_counts = list(work.sizes)
        if work.seeds is not None:
            self.q_counts = [work.seeds] * self.sets
            self.q_ptr = torch.arange(self.sets + 1, device=batch.device, dtype=torch.int32)
            self.q_ptr, self.longest_q = self.q_ptr * work.seeds, work.seeds

    def needs_half(self) -> None:
        if not self.half:
            raise Outcome("refused", "the kernels are for float16 and bfloat16")

    def queries(self, q: Tensor) -> Tensor:
        return q if self.seeds is None else q.repeat(self.sets, 1, 1)

    def result(self, out: Tensor) -> Tensor:
        return out if self.seeds is None else out.unflatten(0, (self.sets, self.seeds))


def varlen(batch: WorkloadBatch) -> Call:
    """torch's own FlashAttention-2 of packed rows."""
    attend = getattr(module("torch.nn.attention.varlen"), "varlen_attn", None)
    if attend is None:
        raise Outcome("missing", "this torch has no varlen_attn")
    return _of_packed_rows(batch, attend)


def flash_attn(batch: WorkloadBatch) -> Call:
    return _of_packed_rows(batch, module("flash_attn").flash_attn_varlen_func)


def _of_packed_rows(batch: WorkloadBatch, attend: Call) -> Call:
    """A call of ``attend(q, k, v, q_ptr, k_ptr, longest_q, longest_k)``."""
    own = Packed(batch)
    own.needs_half()
    bounds = own.q_ptr, own.k_ptr, own.longest_q, own.longest_k
    return lambda q, k, v: own.result(attend(own.queries(q), k, v, *bounds))


def xformers(batch: WorkloadBatch) -> Call:
    attend = module("xformers.ops").memory_efficient_attention
    mask = module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens
    own = Packed(batch)
    own.needs_half()
    place = {"device": batch.device} if "device" in inspect.signature(mask).parameters else {}
    blocks = mask(own.q_counts, own.k_counts, **place)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own.result(attend(own.queries(q)[None], k[None], v[None], attn_bias=blocks)[0])

    return call


def cudnn(batch: WorkloadBatch) -> Call:
    """torch's scaled_dot_product_attention of padded sets by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    Packed(batch).needs_half()
    pad = Padding(batch.workload.sizes, batch.device)
    bias = pad.bias(batch.workload.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if bias is None else bias.expand(-1, q.shape[1], q.shape[2], -1)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return padded(batch, attend, pad)


def flash(batch: WorkloadBatch) -> Call:
    """The same by FlashAttention-2, which knows no mask."""
    if batch.device == "cuda":
        Packed(batch).needs_half()
        if len(set(batch.workload.sizes)) > 1:
            raise Outcome("refused", "sets differ in size: the kernel takes no mask")
    return attention.flash(batch)


RIVALS: dict[str, Callable[[WorkloadBatch], Call]] = {
    "torch varlen": varlen,
    "cudnn, padded": cudnn,
    "flash, padded": flash,
    "efficient, padded": attention.efficient,
    "naive, padded": attention.naive,
    "xformers": xformers,
    "flash_attn": flash_attn,
}
SECOND = ("naive, padded",)  # what has a second derivative; the others refuse or, worse, do not
ANYWHERE = ("naive, padded", "flash, padded")  # runs without CUDA
MODULES = ("module", "module_mha", "pyg", "module_naive")  # names in benchmarks.contenders.modules
