"""The operation: set attention over molecules in a concatenated batch, and seed pooling.

Both are one operation; seed pooling has the same S queries in every molecule. This module holds the
public contract: validation, defaults, and the way to the chosen backend. Everything that can be
wrong with a call is found here, before anything is computed.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import autograd, dispatch
from .dispatch import BackendError
from .dropout import draw_seed
from .operands import Operands, Options
from .problem import Problem
from .ragged import Ragged, Sets, check_contents, check_kind, last_of, remember
from .tracing import PLAIN, autocasting, unreadable

__all__ = ["BackendError", "Problem", "explain", "seed_pool", "set_attention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 3.4e38  # the kernels take the scale as a float32 where they compute in float32


@overload
def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor | Ragged,
    k_ptr: Tensor | Ragged | None = None,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor | Ragged,
    k_ptr: Tensor | Ragged | None = None,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor | Ragged,
    k_ptr: Tensor | Ragged | None = None,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Multi-head attention of every atom over the atoms of its own molecule, without padding.

    For each molecule, head and query row i::

        out_i = Σ_j p_ij v_j,   p_i = softmax_j(scale · q_i·k_j + bias_ij + key_bias_j)

    Args:
        q: [N_q, H, D] packed queries, molecule after molecule. float16, bfloat16, float32 or
            float64; any strides. D up to 512 on the CPU; 256 with Triton, 128 with CUDA kernels.
        k: [N_k, H, D] packed keys, dtype and device of q.
        v: [N_k, H, D_v] packed values, dtype and device of q.
        ptr: [B + 1] boundaries, int32 or int64: molecule b owns rows ptr[b]:ptr[b+1] of q. On the
            CPU or on the device of q; or a ``Ragged``.
        k_ptr: the same for k and v; None: the keys are the atoms of the queries.
        bias: [P, H], or [P, 1] for all heads, added to the logits, dtype of q or float32;
            P = Σ_b n_q·n_k, by molecule, then query, then key (``Ragged.pairs``). -inf forbids.
        key_bias: [N_k, H], or [N_k] or [N_k, 1] for all heads, added to the logits of a key with
            every query of its molecule, dtype of q or float32. No memory per pair. -inf forbids.
        scale: factor of q·k, default D**-0.5.
        dropout: probability in [0, 1) of dropping a weight, on in evaluation too. The mask follows
            from torch's generator and (molecule, head, query, key): the same on all backends.
        backend: a name from ``backends()``, used or refused; None chooses, see ``explain``.
        return_lse: also return log Σ_j exp of the logits.

    Returns:
        out [N_q, H, D_v] in the dtype of q; with ``return_lse`` also lse [N_q, H], natural
        logarithm, float32 (float64 for float64). Rows of a molecule without keys (or with
        only -inf) and rows of no molecule are exactly 0, LSE -inf, with gradient exactly 0.

    Accumulates in float32 (float64 for float64). On the native backends exact to second order in
    q, k, v and both biases; a third derivative raises. With dropout 0 a molecule's result has the
    same bits alone and in any batch of the same backend; on a GPU the automatic choice depends on
    the sizes of the batch, unless ``torch.use_deterministic_algorithms`` is on. No argument depends
    on the longest molecule.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or dtype; of the wrong value, shape or
            device. Contents of ``ptr`` are checked on the CPU only (see ``ragged.check``).
        NotImplementedError: sparse, nested, quantised or subclassed tensors, vmap, forward mode.
        BackendError: the named backend, or every backend, cannot serve the call.

    Under autocast, float32 and half inputs are cast to the autocast dtype, as in torch's attention.
    Source of the algorithm: Milakov & Gimelshein 2018 (online softmax), Rabe & Staats 2021 and Dao
    et al. 2022 (attention in linear memory); equations and second derivative in ``autograd``.

    Examples:
        >>> x = torch.randn(8, 2, 4)
        >>> set_attention(x, x, x, Ragged.from_counts([5, 3])).shape
        torch.Size([8, 2, 4])
    """
    given = Given(q, k, v, ptr, k_ptr, bias, key_bias, scale, dropout, backend, return_lse)
    return _attend("q", given)


@overload
def seed_pool(
    seeds: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor | Ragged,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def seed_pool(
    seeds: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor | Ragged,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def seed_pool(
    seeds: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor | Ragged,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Pools the atoms of each molecule with S learned queries that all molecules share.

    For each molecule b, head and seed s::

        out_bs = Σ_j p_bsj v_j,   p_bs = softmax_j(scale · seed_s·k_j + bias_bsj + key_bias_j)

    Args:
        seeds: [S, H, D], S at least 1, dtype and device of k.
        k, v: [N, H, D] and [N, H, D_v] packed rows, see ``set_attention``.
        ptr: [B + 1] boundaries of the molecules in k and v, or a ``Ragged``.
        bias: [P, H] or [P, 1] with P = Σ_b S·n_b, by molecule, then seed, then atom.
        key_bias: [N, H] or [N], added to the logits of an atom with every seed.
        scale: factor of seed·k, default D**-0.5. A model with the Set Transformer's convention
            divides by the root of the full width H·D: pass (H·D)**-0.5.
        dropout, backend, return_lse: as in ``set_attention``.

    Returns:
        [B, S, H, D_v] in the dtype of k; with ``return_lse`` also [B, S, H]. A molecule without
        atoms gives 0 and LSE -inf. Derivatives, errors and rounding as in ``set_attention``; the
        gradient of the seeds is summed over molecules in a fixed order.

    Source: Lee et al. 2019 (Set Transformer, pooling by multi-head attention); Buterez et al. 2023.

    Examples:
        >>> seeds, x = torch.randn(3, 2, 4), torch.randn(8, 2, 4)
        >>> seed_pool(seeds, x, x, Ragged.from_counts([5, 3])).shape
        torch.Size([2, 3, 2, 4])
    """
    given = Given(seeds, k, v, ptr, None, bias, key_bias, scale, dropout, backend, return_lse)
    return _attend("seeds", given)


def explain(
    q: Tensor | Problem,
    k: Tensor | None = None,
    v: Tensor | None = None,
    ptr: Tensor | Ragged | None = None,
    k_ptr: Tensor | Ragged | None = None,
    *,
    shared: bool = False,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> None:
    """Prints which backend would serve a call, and every reason against each of the others.

    Takes the arguments of ``set_attention``, or with ``shared=True`` those of ``seed_pool``, checks
    them in the same way and computes nothing. Or takes one ``Problem``: the facts of a call, also
    for a machine that is not at hand.

    Examples:
        >>> explain(Problem("cuda", torch.bfloat16, 32, 32))  # doctest: +ELLIPSIS
        torch.bfloat16 on cuda, head_dim=32, value_dim=32
        cpu ...
    """
    if isinstance(q, Problem):
        print(dispatch.table(q))
        return
    given = Given(q, k, v, ptr, k_ptr, bias, key_bias, scale, dropout, backend, return_lse)
    x, options, _ = checked("seeds" if shared else "q", given)
    print(dispatch.table(_problem(x, options, given)))


class Given(NamedTuple):
    """The arguments of a call, as they came."""

    q: Any
    k: Any
    v: Any
    ptr: Any
    k_ptr: Any
    bias: Any
    key_bias: Any
    scale: Any
    dropout: Any
    backend: Any
    return_lse: Any


def _attend(name: str, given: Given) -> Any:
    x, options, sets = checked(name, given)
    problem = _problem(x, options, given)
    if options.dropout > 0:
        x = x._replace(seed=draw_seed(x.q.device))
    result: tuple[Tensor, Tensor | None]
    if x.q.is_meta:  # shapes only: registered operators give them without any backend
        result = autograd.attention("attnpool_triton", x, options)
    else:
        chosen = dispatch.select(problem, given.backend)
        if chosen.KIND == "kernel":
            result = autograd.attention(chosen.OPERATORS, x, options)
        else:
            result = autograd.composite(chosen, x, options, sets)
    out, lse = result
    return (out, lse) if given.return_lse else out


def _problem(x: Operands, options: Options, given: Given) -> Problem:
    tracked = torch.is_grad_enabled() and (
        x.q.requires_grad
        or x.k.requires_grad
        or x.v.requires_grad
        or (x.bias is not None and x.bias.requires_grad)
        or (x.key_bias is not None and x.key_bias.requires_grad)
    )
    # Molecules have forces, so the automatic choice must be right to second order. Who names a
    # backend gets its first derivative, and an error where a second one is asked for.
    grad_order = (2 if given.backend is None else 1) if tracked else 0
    return Problem.of(x, options, grad_order, given.return_lse)


def checked(name: str, given: Given) -> tuple[Operands, Options, Sets]:
    """Validates everything, in the order of the arguments; returns what the backends take."""
    q, k, v = given.q, given.k, given.v
    for label, tensor in ((name, q), ("k", k), ("v", v)):
        _check_packed(label, tensor)
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(
            f"{name}, k and v must be on one device, got {device}, {k.device} and {v.device}"
        )
    if autocasting(device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(
            f"{name}, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    _check_shapes(name, q, k, v)
    shared = name == "seeds"
    ptr, sets = _boundaries("ptr", given.ptr, k if shared else q)
    if shared:
        q_ptr, k_ptr, held = None, ptr, Sets(None, sets)
    elif given.k_ptr is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                "q and k must have the same number of rows where k_ptr is None, "
                f"got {q.shape[0]} and {k.shape[0]}"
            )
        q_ptr, k_ptr, held = ptr, ptr, Sets(sets, sets)
    else:
        q_ptr, (k_ptr, key_sets) = ptr, _boundaries("k_ptr", given.k_ptr, k)
        held = Sets(sets, key_sets)
        if q_ptr.shape[0] != k_ptr.shape[0]:
            raise ValueError(
                f"k_ptr must have as many elements as ptr, {q_ptr.shape[0]}, got {k_ptr.shape[0]}"
            )
        if q_ptr.dtype != k_ptr.dtype:
            q_ptr, k_ptr = q_ptr.long(), k_ptr.long()
    bias = pair_ptr = key_bias = None
    if given.bias is not None:
        bias, pair_ptr = _check_bias(given.bias, q, k, q_ptr, k_ptr)
    if given.key_bias is not None:
        key_bias = _check_key_bias(given.key_bias, k)
    options = _checked_options(given, q.shape[2])
    return Operands(q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, None), options, held


def _checked_options(given: Given, head_dim: int) -> Options:
    scale, dropout = given.scale, given.dropout
    if scale is None:
        scale = head_dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    elif not abs(scale) <= _LARGEST:  # false for nan, and for an int that no float can hold
        raise ValueError(f"scale must be finite and fit into float32, got {scale}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout must be a float, got {type(dropout).__name__}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if given.backend is not None:
        dispatch.check_name(given.backend)
    if not isinstance(given.return_lse, bool):
        raise TypeError(f"return_lse must be a bool, got {type(given.return_lse).__name__}")
    return Options(float(scale), dropout)


def _check_packed(name: str, x: object) -> None:
    if type(x) not in PLAIN or x.is_nested:  # type: ignore[attr-defined]
        _check_subclass(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in _DTYPES:
        wanted = "float16, bfloat16, float32 or float64"
        if x.dtype.is_floating_point or x.is_quantized:
            raise NotImplementedError(f"{name} must be {wanted}, got {x.dtype}")
        raise TypeError(f"{name} must be {wanted}, got {x.dtype}")
    _check_strided(name, x)
    if x.dim() != 3:
        shape = "[S, H, D]" if name == "seeds" else "[N, H, D]"
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def _check_strided(name: str, x: Tensor) -> None:
    """Refuses memory layouts, and torch.func's wrappers, that the operators do not see through."""
    if x.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a dense strided tensor, got {x.layout}")
    if torch.compiler.is_compiling():
        return  # a compiler refuses these by itself
    mode = torch.autograd.forward_ad
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    if wrapped and torch._C._functorch.is_batchedtensor(x):
        raise NotImplementedError(f"{name} is batched by vmap: put the molecules into one batch")
    if mode._current_level >= 0 and mode.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name} has a forward-mode tangent: use reverse mode")
    if wrapped and torch._C._functorch.is_gradtrackingtensor(x):
        raise NotImplementedError(f"{name} is inside torch.func: use torch.autograd.grad")


def _check_subclass(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise NotImplementedError(f"{name} is a nested tensor: pass its values() and offsets()")
    if torch.compiler.is_compiling():
        return
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if not isinstance(x, FakeTensor | FunctionalTensor):
        raise NotImplementedError(f"{name} must be a plain torch.Tensor, got {type(x).__name__}")


def _check_shapes(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k and v must have as many rows, got {k.shape[0]} and {v.shape[0]}")
    if q.shape[1] != k.shape[1] or k.shape[1] != v.shape[1]:
        raise ValueError(
            f"{name}, k and v must have the same number of heads, "
            f"got {q.shape[1]}, {k.shape[1]} and {v.shape[1]}"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{name} and k must have the same head dimension, got {q.shape[2]} and {k.shape[2]}"
        )
    for label, x in ((name, q), ("v", v)):
        if x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(
                f"{label} must have at least 1 head and dimension 1, got {tuple(x.shape)}"
            )
    if name == "seeds" and q.shape[0] == 0:
        raise ValueError(f"seeds must hold at least 1 seed, got {tuple(q.shape)}")


def _autocast(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _boundaries(name: str, ptr: object, rows_of: Tensor) -> tuple[Tensor, Ragged | None]:
    """Boundaries as the kernels take them: checked, contiguous, on the device of the rows; and the
    ``Ragged`` that holds them there.
    """
    ragged = None
    if isinstance(ptr, Ragged):
        ragged, ptr = ptr, ptr.ptr
    else:
        check_kind(ptr, name)
    assert isinstance(ptr, Tensor)
    ptr = ptr.contiguous()
    rows, device = rows_of.shape[0], rows_of.device
    if ptr.dtype == torch.int32 and rows >= 2**31:
        raise ValueError(f"{name} must be int64 for {rows} rows, got int32")
    if ptr.device.type == "cpu" and device.type != "meta" and not unreadable(ptr):
        last = None if ragged is None else ragged.last  # known: the rest was checked as well
        if last is None or last > rows:
            check_contents(ptr, rows, name)
    if ptr.device != device:
        if ptr.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU or on {device}, got {ptr.device}")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{name} is on the CPU: it cannot be copied into a captured graph")
        moved = ptr.to(device, non_blocking=True)
        if ragged is not None and not unreadable(ptr) and (sizes := ragged.sizes):
            remember(moved, sizes)
        return moved, None
    return ptr, ragged


def _check_added(name: str, x: object, k: Tensor) -> Tensor:
    """What every tensor must be that is added to the logits."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
    if type(x) not in PLAIN or x.is_nested:
        _check_subclass(name, x)
    _check_strided(name, x)
    if x.dtype not in (k.dtype, torch.float32):
        wanted = "torch.float32" if k.dtype == torch.float32 else f"{k.dtype} or torch.float32"
        raise TypeError(f"{name} must be {wanted}, got {x.dtype}")
    if x.device != k.device:
        raise ValueError(f"{name} must be on {k.device}, got {x.device}")
    return x


def _check_key_bias(given: object, k: Tensor) -> Tensor:
    """[N_k, H], expanded over the heads where it has one number per key."""
    key_bias = _check_added("key_bias", given, k)
    shape, (rows, heads) = key_bias.shape, k.shape[:2]
    if key_bias.dim() == 1:
        key_bias = key_bias[:, None]
    if key_bias.dim() != 2 or key_bias.shape[0] != rows or key_bias.shape[1] not in (1, heads):
        raise ValueError(
            f"key_bias must have shape [{rows}] or [{rows}, {heads}], got {tuple(shape)}"
        )
    return key_bias if key_bias.shape[1] == heads else key_bias.expand(-1, heads)


def _check_bias(
    given: object, q: Tensor, k: Tensor, q_ptr: Tensor | None, k_ptr: Tensor
) -> tuple[Tensor, Tensor]:
    """The bias [P, H], and the offsets [B + 1] of each molecule's pairs.

    The offsets are those of lengths clamped to the rows.
    """
    bias, heads = _check_added("bias", given, k), k.shape[1]
    if bias.dim() != 2 or bias.shape[1] not in (1, heads):
        raise ValueError(f"bias must have shape [P, {heads}] or [P, 1], got {tuple(bias.shape)}")
    if bias.shape[1] != heads:
        bias = bias.expand(-1, heads)
    n_k = _lengths(k_ptr, k.shape[0])
    n_q = q.shape[0] if q_ptr is None else n_k if q_ptr is k_ptr else _lengths(q_ptr, q.shape[0])
    pair_ptr = torch.cat([n_k.new_zeros(1), (n_q * n_k).cumsum(0)])
    if bias.device.type == "cpu" and not unreadable(bias) and last_of(pair_ptr) != bias.shape[0]:
        raise ValueError(
            f"bias must have P = {last_of(pair_ptr)} rows, one for each query-key pair of each "
            f"molecule, got {bias.shape[0]}"
        )
    return bias, pair_ptr


def _lengths(ptr: Tensor, rows: int) -> Tensor:
    return ptr.long().clamp(0, rows).diff().clamp(min=0)
