"""The judge judged: correct float32 passes, small planted errors, and other arithmetic in torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from attnpool_kernels import testing
from attnpool_kernels.testing import Case, rounding

ROOT = Path(__file__).parents[2]
CASE = Case("planted", (18, 40, 1, 33), heads=2, dim=16, bias="pair", dropout=0.3, lse=True)
LARGE = Case("large", (18, 40, 33), heads=2, dim=16, logits=30.0, lse=True)
EXACT = {case.name: case for case in testing.CASES}


def same(x, what):
    return x


def bits(x, count):
    """x rounded to a significand of ``count`` bits; 11 is TF32."""
    fraction, power = torch.frexp(x)
    return torch.ldexp(torch.round(fraction * 2**count) / 2**count, power)


def product(x, y, what):
    return x @ y


def passes(batch, change=same, multiply=product, dtype=torch.float32):
    """(F1)-(D12) in float32, of molecules with own queries; (D6) as csrc/equations.h centres it.

    change(x, name) may replace a quantity where it is used; multiply(x, y, name) a matrix product.
    Half types are rounded before a product.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case, c = batch.case, torch.tensor(batch.scale, dtype=wide)
    parts = {}
    for index in range(len(case.counts)):
        cut = rounding.Cut(batch, index)

        def put(name, x):
            stored = batch.bias.dtype if "bias" in name else dtype
            x = rounding.packed(x, name).to(wide if "lse" in name else stored)
            parts.setdefault(name, []).append(x)

        def half(x, name):
            return change(x, name).to(dtype).to(wide)

        q, k, v, dout, a, b, e = (
            cut.rows(n).to(wide) for n in ("q", "k", "v", "dout", "ddq", "ddk", "ddv")
        )
        s = multiply(change(q, "q of S"), k.mT, "S") * c
        if batch.bias is not None:
            s = s + cut.pairs(batch.bias).to(wide)
        s = change(s, "S")
        lse = change(s.logsumexp(2, keepdim=True), "lse")
        p = change(torch.exp(s - lse), "P")
        r = 1.0 if batch.seed is None else cut.keep().to(wide)
        r = change(r, "R")
        out = change(multiply(half(p * r, "P of O"), v, "O"), "O")
        dlse = cut.rows("dlse").to(wide) if batch.dlse is not None else 0.0
        dp = r * multiply(dout, v.mT, "dP")
        delta = change((p * dp).sum(2, keepdim=True), "delta")
        delta_l = delta - change(dlse, "dlse")
        ds = p * (dp - delta_l)
        put("out", out), put("lse", lse)
        put("dv", multiply(half(p * r, "P of dV").mT, dout, "dV"))
        put("dq", change(c, "c of dQ") * multiply(half(ds, "dS of dQ"), k, "dQ"))
        put("dk", c * multiply(half(ds, "dS of dK").mT, q, "dK"))
        t = c * (multiply(a, k.mT, "AK") + multiply(q, b.mT, "QB"))
        if batch.bias is not None:
            put("dbias", ds)
            t = t + change(cut.pairs(batch.ddbias).to(wide), "E")
        row_t = (p * t).sum(2, keepdim=True)
        g = r * multiply(dout, e.mT, "G")
        w = change((p * g).sum(2, keepdim=True), "w")
        y = (p * (t - row_t) * (dp - delta_l)).sum(2, keepdim=True) + w
        u = p * (t - change(row_t, "t of U"))
        z = p * ((t - change(row_t, "t of Z")) * (dp - delta_l) + g - y)
        zh, dsh, uh = half(z, "Z"), half(ds, "dS of gQ"), half(u * r, "U")
        put("gq", c * (multiply(dsh, b, "dS·B") + multiply(zh, k, "ZK")))
        put("gk", c * (multiply(dsh.mT, a, "dSA") + multiply(zh.mT, q, "ZQ")))
        put("gv", multiply(uh.mT, dout, "gV"))
        put("gdout", multiply(uh, v, "UV") + multiply(half(p * r, "P of gdO"), e, "PC"))
        put("gdlse", row_t)
        if batch.bias is not None:
            put("gbias", z)
    found = {name: torch.cat(x) for name, x in parts.items()}
    return found if batch.dlse is not None else {k: x for k, x in found.items() if k != "gdlse"}


def at(name, do):
    """A change of one quantity."""
    return lambda x, what: do(x) if what == name else x


def without_last(x):
    return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1)


def in_half_sums(name, dtype):
    """The product ``name`` with the second half of its terms added up in a half type."""

    def multiply(x, y, what):
        if what != name:
            return x @ y
        n = x.shape[2] // 2
        total = x[..., :n] @ y[:, :n]
        for j in range(n, x.shape[2]):
            total = (total + x[..., j : j + 1] * y[:, j : j + 1]).to(dtype).float()
        return total

    return multiply


def tf32(x, y, what):
    return bits(x, 11) @ bits(y, 11)


def shifted(x):
    return torch.roll(x, 1, 1)


FAULTS = {
    "the last lane of D left out of S": {"change": at("q of S", without_last)},
    "no scale in dq": {"change": at("c of dQ", torch.ones_like)},
    "TF32 products": {"multiply": tf32},
    "one TF32 product": {
        "multiply": lambda x, y, what: (tf32 if what == "ZK" else product)(x, y, "")
    },
    "P in bfloat16": {"change": at("P", lambda x: x.bfloat16().float())},
    "P in bfloat16 for dv": {"change": at("P of dV", lambda x: x.bfloat16().float())},
    "P in float16 for gdout": {"change": at("P of gdO", lambda x: x.half().float())},
    "S of 20 bits": {"change": at("S", lambda x: bits(x, 20))},
    "lse of 18 bits": {"change": at("lse", lambda x: bits(x, 18))},
    "no delta": {"change": at("delta", torch.zeros_like)},
    "delta of 16 bits": {"change": at("delta", lambda x: bits(x, 16))},
    "no cotangent of lse": {"change": at("dlse", torch.zeros_like)},
    "delta of the neighbour": {"change": at("delta", shifted)},
    "half of the sum of dq in float16": {"multiply": in_half_sums("dQ", torch.float16)},
    "half of the sum of out in bfloat16": {"multiply": in_half_sums("O", torch.bfloat16)},
    "no w": {"change": at("w", torch.zeros_like)},
    "no t in U": {"change": at("t of U", torch.zeros_like)},
    "no t in Z": {"change": at("t of Z", torch.zeros_like)},
    "no E": {"change": at("E", torch.zeros_like)},
    "dropout without its factor": {"change": at("R", torch.sign)},
    "Z of 17 bits": {"change": at("Z", lambda x: bits(x, 17))},
    "dS of 17 bits for gk": {"change": at("dS of gQ", lambda x: bits(x, 17))},
    "one value of out": {"change": at("O", lambda x: x + 1e-5 * (x == x.max()))},
}
# what half types do not allow: P, dS, U and Z are rounded once, sums are float32
HALF_FAULTS = {
    "the last lane of D left out of S": {"change": at("q of S", without_last)},
    "no cotangent of lse": {"change": at("dlse", torch.zeros_like)},
    "P rounded to 6 bits for dv": {"change": at("P of dV", lambda x: bits(x, 6))},
    "dS rounded to 6 bits for dq": {"change": at("dS of dQ", lambda x: bits(x, 6))},
    "half of the sum of dq in bfloat16": {"multiply": in_half_sums("dQ", torch.bfloat16)},
    "half of the sum of dv in bfloat16": {"multiply": in_half_sums("dV", torch.bfloat16)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASE, LARGE, EXACT["longer"]], ids=lambda case: case.name)
def test_the_equations_in_float32_pass(case, dtype):
    testing.judge(case, dtype, lambda batch: passes(batch, dtype=dtype))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_error_is_caught(fault):
    with pytest.raises(AssertionError, match="times its budget"):
        testing.judge(CASE, torch.float32, lambda batch: passes(batch, **FAULTS[fault]))


@pytest.mark.parametrize("fault", HALF_FAULTS)
def test_a_planted_error_is_caught_in_bfloat16(fault):
    def run(batch):
        return passes(batch, dtype=torch.bfloat16, **HALF_FAULTS[fault])

    with pytest.raises(AssertionError, match="times its budget"):
        testing.judge(CASE, torch.bfloat16, run)


def test_logits_in_half_precision_are_caught_where_they_are_large():
    def run(batch):
        return passes(batch, at("S", lambda x: x.bfloat16().float()), dtype=torch.bfloat16)

    with pytest.raises(AssertionError, match="times its budget"):
        testing.judge(LARGE, torch.bfloat16, run)


def test_other_places_of_infinity_and_other_shapes_are_caught():
    def dead(batch):
        found = testing.run_public(batch, "reference")
        return found | {"lse": found["lse"].nan_to_num(neginf=-1e30)}

    with pytest.raises(AssertionError, match="lse: not finite in other places"):
        testing.judge(EXACT["empty among them"], torch.float32, dead)

    def short(batch):
        return {name: x[1:] for name, x in testing.run_public(batch, "reference").items()}

    with pytest.raises(AssertionError, match="out: shape"):
        testing.judge(CASE, torch.float32, short)


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_the_equations_of_the_model_are_those_of_the_oracle(case):
    """Beside each variance the model has the exact value, from other equations than torch's."""
    batch = case.make(torch.float64)
    exact = testing.differentiate(
        lambda x: testing.dense(batch, torch.float64, x), batch, torch.float64
    )
    found = rounding.model(batch, torch.float64)
    assert found.keys() == exact.keys()
    for name, (value, variance) in found.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-11, msg=name)
        assert variance.isfinite().all() and (variance >= 0).all(), name


def test_variances_are_those_of_drawn_roundings():
    """Monte Carlo: random roundings of float32's size, in float64, have the model's variances."""
    batch = replace(CASE, counts=(9, 1, 14), dim=8).make(torch.float64)
    exact = passes64(batch, 0.0)
    square = {name: torch.zeros_like(x) for name, x in exact.items()}
    draws = 40
    for _ in range(draws):
        for name, x in passes64(batch, torch.finfo(torch.float32).eps / 4).items():
            square[name] += (x - exact[name]) ** 2 / draws
    for name, (_, variance) in rounding.model(batch, torch.float32).items():
        ratio = (square[name].sum() / variance.sum()).sqrt().item()
        assert 0.2 < ratio < 1.0, (name, ratio)


def passes64(batch, size):
    """The passes in float64 with every product and quantity off by a normal relative error."""

    def noisy(x):
        return x * (1 + size * torch.randn(x.shape, dtype=torch.float64))

    def change(x, what):
        return noisy(x) if isinstance(x, torch.Tensor) and what in ("S", "P", "lse", "delta") else x

    def multiply(x, y, what):
        terms = noisy(x[..., None] * y[:, None])  # a tree of sums, each rounded
        while terms.shape[2] > 1:
            n = terms.shape[2] // 2
            rest = terms[:, :, 2 * n :]
            terms = torch.cat([noisy(terms[:, :, :n] + terms[:, :, n : 2 * n]), rest], 2)
        return terms[:, :, 0]

    return passes(batch, change, multiply, torch.float64)


class Lucky(TorchFunctionMode):
    """Products and softmax of float32 computed in float64: the luck of another machine's BLAS."""

    NAMES = ("einsum", "matmul", "__matmul__", "bmm", "mm", "softmax", "logsumexp", "exp")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in self.NAMES:
            return func(*args, **(kwargs or {}))

        def wide(x):
            return x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

        narrow = any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in args)
        result = func(*(wide(x) for x in args), **(kwargs or {}))
        return result.float() if narrow else result


def ratios(case, dtype, found):
    batch = case.make(dtype)
    exact = testing.differentiate(
        lambda x: testing.dense(batch, torch.float64, x), batch, torch.float64
    )
    variances = testing.budget(batch, dtype)
    return {name: testing.measure(found[name], exact[name], variances[name]) for name in exact}


@pytest.mark.parametrize("case", [CASE, LARGE], ids=lambda case: case.name)
def test_the_verdict_does_not_know_torchs_own_error(case):
    """The yardstick once was the error of torch's formula in the same type, on this machine."""
    found = passes(case.make(torch.float32))
    expected = ratios(case, torch.float32, found)
    with Lucky():
        again = ratios(case, torch.float32, found)
    for name, ratio in expected.items():
        assert again[name] == pytest.approx(ratio, rel=1e-6), name


OTHER_PROCESS = """
import json, sys, pytest, torch
sys.path[:0] = [{tests!r}, {tests!r} + "/testing"]
from tools import seeds
seeds.install(pytest.MonkeyPatch())
from test_budget import LARGE, ratios
torch.set_num_threads({threads})
print(json.dumps(ratios(LARGE, torch.float32, torch.load({path!r}))))
"""


@pytest.mark.parametrize(
    ("capability", "instructions", "threads"),
    [("default", "SSE4_2", 1), ("avx2", "AVX512", 4)],
)
def test_the_verdict_is_that_of_another_machine(tmp_path, capability, instructions, threads):
    found = passes(LARGE.make(torch.float32))
    torch.save(found, tmp_path / "found.pt")
    code = OTHER_PROCESS.format(
        tests=str(ROOT / "tests"), path=str(tmp_path / "found.pt"), threads=threads
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ
        | {"ATEN_CPU_CAPABILITY": capability, "MKL_ENABLE_INSTRUCTIONS": instructions},
    )
    again = json.loads(done.stdout)
    for name, ratio in ratios(LARGE, torch.float32, found).items():
        assert again[name] == pytest.approx(list(ratio), rel=1e-6), name
