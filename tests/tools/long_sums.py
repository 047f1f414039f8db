"""Sums of very many terms: problems of nearly equal keys, and how far their results are off.

Near-equal terms are the hard case of a running sum: it rounds in the same direction every time, and
from 2^24 equal terms on a float32 no longer moves at all. Errors are counted in units of the
rounding (eps) of the sum of the absolute terms, a number that a summation by blocks keeps small
whatever the number of terms is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnpool_kernels.impl import KernelBackend
from attnpool_kernels.operands import Cotangents, Operands, Options, Tangents

UNITS = 8.0  # of eps: a few products, one block of terms, and the softmax's own rounding
SCALE = 0.5


def near_equal(
    keys: int,
    queries: int = 1,
    molecules: int = 0,
    width: int = 2,
    spread: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """One molecule with this many queries and keys, or ``molecules`` of so many that share seeds.

    All numbers are 3.3, of q and k 0.3, but for the spread; float32. The LSE has a cotangent of 30,
    else the terms of dq and gq would cancel.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(size: float, *shape: int) -> Tensor:
        return size * (1 + spread * torch.randn(*shape, 1, width, generator=generator))

    batch, n = max(molecules, 1), max(molecules, 1) * keys
    rows = (molecules, queries) if molecules else (queries,)
    return {
        "q": near(0.3, queries),
        "k": near(0.3, n),
        "v": near(3.3, n),
        "dout": near(3.3, *rows),
        "ddq": near(3.3, queries),
        "ddk": near(3.3, n),
        "ddv": near(3.3, n),
        "dlse": near(30, *rows)[..., 0],
        "q_ptr": None if molecules else torch.tensor([0, queries]),
        "k_ptr": torch.arange(batch + 1) * keys,
    }


def run(problem: dict[str, Any], kernels: KernelBackend) -> dict[str, Tensor]:
    """The three passes of a kernel backend."""
    p = problem
    x = Operands.plain(p["q"], p["k"], p["v"], p["q_ptr"], p["k_ptr"])
    dy, options = Cotangents(p["dout"], p["dlse"]), Options(SCALE)
    tangents = Tangents(p["ddq"], p["ddk"], p["ddv"])
    y = kernels.forward(x, options)
    dx = kernels.backward(x, y, dy, options, False)
    gx = kernels.double_backward(x, y, dy, tangents, options)
    found = y._asdict() | dx._asdict() | gx._asdict()
    return {name: result for name, result in found.items() if not name.endswith("bias")}


def errors(problem: dict[str, Any], found: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result in units of eps times the sum of the absolute terms.

    The truth is the list of equations of ``autograd`` in float64, molecules as an axis.
    """
    p, shared, c = problem, problem["q_ptr"] is None, SCALE
    molecules = p["k_ptr"].numel() - 1

    def wide(name: str, keys: bool) -> Tensor:
        x = p[name].double().squeeze(-2)  # the one head
        if keys:
            return x.unflatten(0, (molecules, -1))
        return x if x.dim() == 3 else x[None].expand(molecules if shared else 1, -1, -1)

    q, a, dout = (wide(x, False) for x in ("q", "ddq", "dout"))
    k, v, b, cv = (wide(x, True) for x in ("k", "v", "ddk", "ddv"))

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.transpose(1, 2)

    def mean(x: Tensor) -> Tensor:
        return (w * x).sum(2, keepdim=True)

    logits = c * pairs(q, k)
    w, lse = logits.softmax(2), logits.logsumexp(2)
    dp, t, g = pairs(dout, v), c * (pairs(a, k) + pairs(q, b)), pairs(dout, cv)
    delta, t_mean = mean(dp), mean(t)
    y = mean((t - t_mean) * (dp - delta)) + mean(g)
    delta = delta - p["dlse"].double().reshape(*delta.shape)
    ds, u = w * (dp - delta), w * (t - t_mean)
    z = u * (dp - delta) + w * (g - y)
    by_keys = [x.transpose(1, 2) for x in (w, ds, u, z)]
    truth = {
        "out": w @ v,
        "lse": lse,
        "dq": c * ds @ k,
        "dk": c * by_keys[1] @ q,
        "dv": by_keys[0] @ dout,
        "gq": c * (ds @ b + z @ k),
        "gk": c * (by_keys[1] @ a + by_keys[3] @ q),
        "gv": by_keys[2] @ dout,
        "gdout": u @ v + w @ cv,
        "gdlse": t_mean.squeeze(2),
    }
    if shared:
        truth |= {name: truth[name].sum(0, keepdim=True) for name in ("dq", "gq")}
    size = {name: p[name].abs().max().item() for name in ("q", "k", "v", "dout", "ddq")}
    size |= {"b": p["ddk"].abs().max().item(), "c": p["ddv"].abs().max().item()}
    tops = {"p": w.sum(1).max().item(), "dp": dp.abs().max().item(), "t": t.abs().max().item()}
    tops["ds"] = 2 * tops["dp"] + p["dlse"].abs().max().item()
    tops["z"] = 2 * tops["t"] * (tops["ds"] + 2 * tops["dp"]) + 2 * g.abs().max().item()
    seeds = molecules if shared else 1
    terms = {
        "out": size["v"],
        "lse": lse.abs().max().item(),
        "gdlse": tops["t"],
        "dq": seeds * c * tops["ds"] * size["k"],
        "dk": tops["p"] * c * tops["ds"] * size["q"],
        "dv": tops["p"] * size["dout"],
        "gv": tops["p"] * 2 * tops["t"] * size["dout"],
        "gq": seeds * c * (tops["ds"] * size["b"] + tops["z"] * size["k"]),
        "gk": tops["p"] * c * (tops["ds"] * size["ddq"] + tops["z"] * size["q"]),
        "gdout": 2 * tops["t"] * size["v"] + size["c"],
    }
    result = {}
    for name, expected in truth.items():
        x = found[name].double().reshape(expected.shape)
        eps = torch.finfo(torch.float32).eps
        result[name] = (x - expected).abs().max().item() / (eps * terms[name])
    return result
