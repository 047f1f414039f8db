"""Adapters to other libraries against the oracle: values, gradients, and no wrong second ones.

Three rows a case: the value; the first gradients as the library computes them; the second ones,
which are ours or are refused by name.
"""

from __future__ import annotations

from typing import Any

from gpu.case import Case, Emit, Settings

NAME = "adapters"
WEIGHT = 3.0
# Native kernels of half precision first; torch's own take every dtype; flex compiles for long.
LIBRARIES = {
    "varlen": ("bfloat16", "float16"),
    "xformers": ("bfloat16", "float16"),
    "flash_attn": ("bfloat16", "float16"),
    "sdpa": ("bfloat16", "float32"),
    "flex": ("float32",),
}
CASES = ("molecules", "empty among them", "longer", "other keys", "four seeds", "fused projection")
FEW = ("molecules", "four seeds")


def PARALLEL(settings: Settings) -> int:
    return max(1, min(4, settings.cores // 2)) if settings.device == "cuda" else 1


def cases(settings: Settings) -> list[Case]:
    return [
        Case(
            NAME,
            name,
            library,
            dtype,
            seconds=90.0,
            shard=f"{library} {dtype}" if settings.device == "cuda" else "all",
        )
        for library, dtypes in LIBRARIES.items()
        if settings.wants(library)
        for dtype in (dtypes if settings.device == "cuda" else dtypes[-1:])
        for name in (FEW if settings.device == "cpu" or library == "flex" else CASES)
    ]


def run(case: Case, settings: Settings, emit: Emit) -> None:
    """The first row may refuse the whole case; the others say of themselves what they are."""
    import torch

    from attnpool_kernels import BackendError
    from gpu import batches

    dtype = getattr(torch, case.dtype)
    batch = batches.CASES[case.name].make(dtype, settings.device)
    emit({"what": "value"} | value(batch, case.backend, dtype))
    for what, step in (("first derivative", first), ("second derivative", second)):
        try:
            row = step(batch, case.backend, dtype)
        except NotImplementedError as error:
            row = {"status": "refused", "text": f"NotImplementedError: {error}"[:300]}
        except RuntimeError as error:  # BackendError is one
            text = str(error).splitlines()[0][:300]
            if not isinstance(error, BackendError) and "not implemented" not in text:
                raise
            row = {"status": "refused", "text": text}
        emit({"what": what} | row)


def attend(batch: Any, inputs: list, backend: str) -> Any:
    from attnpool_kernels import seed_pool, set_attention

    options = {"scale": batch.scale, "backend": backend}
    if batch.q_ptr is None:
        return seed_pool(*inputs, batch.k_ptr, **options)
    if batch.q_ptr is batch.k_ptr:
        return set_attention(*inputs, batch.k_ptr, **options)
    return set_attention(*inputs, batch.q_ptr, batch.k_ptr, **options)


def value(batch: Any, backend: str, dtype: Any) -> dict[str, Any]:
    import torch

    from gpu import judgement

    with torch.no_grad():
        out = attend(batch, [batch.q, batch.k, batch.v], backend)
    return judgement.judged(batch, {"out": out}, dtype)


def first(batch: Any, backend: str, dtype: Any) -> dict[str, Any]:
    """As the library computes it: no graph of the gradient is asked for."""
    import torch

    from gpu import judgement

    inputs = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    found = torch.autograd.grad(attend(batch, inputs, backend), inputs, batch.dout)
    return judgement.judged(_plain(batch), dict(zip(("dq", "dk", "dv"), found)), dtype)


def second(batch: Any, backend: str, dtype: Any) -> dict[str, Any]:
    """The derivative of the gradients: right, or refused. Silently wrong is what must not be."""
    import torch

    from gpu import judgement

    inputs = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    out = attend(batch, inputs, backend)
    gradients = torch.autograd.grad(out, inputs, batch.dout, create_graph=True)
    cotangents = [batch.ddq, batch.ddk, batch.ddv]
    found = torch.autograd.grad(gradients, inputs, cotangents)
    return judgement.judged(_plain(batch), dict(zip(("gq", "gk", "gv"), found)), dtype)


def _plain(batch: Any) -> Any:
    """Without a cotangent of the lse, which the calls here do not ask for."""
    from dataclasses import replace

    return replace(batch, dlse=None, case=replace(batch.case, lse=False))
