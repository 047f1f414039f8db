"""Modules that implement the documented semantics of other libraries' packed attention on the CPU.

They check what the libraries need but do not always check (int32 boundaries, no empty sequences,
aligned rows, widths), and their second derivative is silently missing, as in the real ones.
"""

import sys
from dataclasses import replace
from types import ModuleType

import torch

from attnpool_kernels import dispatch
from attnpool_kernels.impl import flash_attn, needs, packing, varlen, xformers

calls = []  # (name, sequences) of every call


class _Packed(torch.autograd.Function):
    """softmax(scale·qkᵀ)v of each sequence, float32 inside; its backward knows no derivative."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale):
        ctx.save_for_backward(q, k, v)
        ctx.options = cu_q.tolist(), cu_k.tolist(), scale
        out, lse = _sequences(q, k, v, *ctx.options)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # like flash-attn: the cotangent of the LSE is ignored
        good(dout)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out, _ = _sequences(*inputs, *ctx.options)
        with torch.no_grad():
            found = torch.autograd.grad(out, inputs, dout)
        return *(x.detach() for x in found), None, None, None


def _sequences(q, k, v, cu_q, cu_k, scale):
    outs, lses = [], []
    for i in range(len(cu_q) - 1):
        own, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        logits = scale * torch.einsum("ihd,jhd->hij", q[own].float(), k[keys].float())
        out = torch.einsum("hij,jhd->ihd", logits.softmax(2), v[keys].float())
        outs.append(out.to(q.dtype))
        lses.append(logits.logsumexp(2))
    return torch.cat(outs), torch.cat(lses, 1)  # [H, N]


def good(x):
    assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    assert all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])


def packed(name, q, k, v, cu_q, cu_k, max_q, max_k, scale):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert 1 < len(cu_q) <= packing.GRID + 1
    for rows, cu, longest in ((q, cu_q, max_q), (k, cu_k, max_k)):
        counts = cu.diff()
        assert cu[0] == 0 and cu[-1] == rows.shape[0] and counts.min() > 0
        assert type(longest) is int and longest >= counts.max()
        good(rows)
    good(v)
    calls.append((name, len(cu_q) - 1))
    return _Packed.apply(q, k, v, cu_q, cu_k, scale)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    arguments = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
    out, lse = packed("flash_attn 2", *arguments)
    return (out, lse, q.new_zeros(0)) if return_attn_probs else out


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    deterministic=False,
    return_attn_probs=False,
):
    arguments = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
    out, lse = packed("flash_attn 3", *arguments)
    return (out, lse) if return_attn_probs else out


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    deterministic=False,
    return_lse=False,
):
    assert qv is None and return_lse
    arguments = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
    return packed("flash_attn 4", *arguments)


class AuxRequest:
    def __init__(self, lse=False):
        self.lse = lse


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert return_aux.lse
    return packed("varlen", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert all(type(n) is int for n in [*q_seqlen, *kv_seqlen]) and device is not None
        mask = cls()
        mask.counts = q_seqlen, kv_seqlen
        return mask


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1 and p == 0.0
    counts = [torch.tensor([0, *n]) for n in attn_bias.counts]
    cu = [n.cumsum(0).int() for n in counts]
    longest = [int(n.max()) for n in counts]
    out, _ = packed("xformers", query[0], key[0], value[0], *cu, *longest, scale)
    return out[None]


def _module(name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


MODULES = {
    "flash_attn 2": [
        _module("flash_attn", flash_attn_varlen_func=flash_attn_2, __version__="2.8.4")
    ],
    "flash_attn 3": [_module("flash_attn_interface", flash_attn_varlen_func=flash_attn_3)],
    "flash_attn 4": [
        _module("flash_attn", __path__=[]),
        _module("flash_attn.cute", flash_attn_varlen_func=flash_attn_4),
    ],
    "varlen": [
        _module("torch.nn.attention.varlen", varlen_attn=varlen_attn, AuxRequest=AuxRequest)
    ],
    "xformers": [
        _module("xformers", __path__=[]),
        _module("xformers.ops", __path__=[], memory_efficient_attention=memory_efficient_attention),
        _module("xformers.ops.fmha", __path__=[]),
        _module("xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask),
    ],
}


def forget():
    """Empties every cache that depends on what is installed."""
    for cached in (needs.find, flash_attn.load, flash_attn._packed_lse, flash_attn._parameters):
        cached.cache_clear()
    dispatch._chosen.clear()


def install(monkeypatch, name):
    """Puts a stand-in where the library would be, on CPU tensors. Returns the backend's name."""
    for module in MODULES[name]:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    backend, _, version = name.partition(" ")
    if version:
        monkeypatch.setattr(flash_attn, "versions", lambda capability: (int(version),))
    for module in (flash_attn, varlen, xformers):
        monkeypatch.setattr(module, "NEEDS", replace(module.NEEDS, devices=("cpu",)))
    forget()
    calls.clear()
    return backend
