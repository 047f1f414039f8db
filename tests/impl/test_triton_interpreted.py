"""The Triton backend in Triton's interpreter, under the guard: the error budget, and the operators.

Runs where TRITON_INTERPRET=1 was set before triton was imported; test_triton.py starts it so.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (see test_triton.py)", allow_module_level=True)

import functools
import importlib.util
import inspect
import sys
from dataclasses import replace

import torch
import triton
import triton.language as tl
from tools.interpreted import run, with_red_zones
from tools.triton_guard import GuardError, guard, padded

import attnpool_kernels.impl.triton as backend
from attnpool_kernels import ops, testing
from attnpool_kernels.dispatch import Problem
from attnpool_kernels.impl.triton import tile_table
from attnpool_kernels.operands import Cotangents, Operands, Options, Tangents
from attnpool_kernels.testing import Case

OF_DTYPES = (
    Case("edges", (1, 16, 33, 0, 17), heads=1, dim=16, nobody=1),
    Case(
        "everything",
        (18, 5),
        bias="pair",
        key_bias="float32",
        dropout=0.3,
        lse=True,
        dim=12,
        value_dim=20,
    ),
    Case("other keys", (4, 0, 37, 2), q_counts=(6, 5, 0, 34), dim=24, heads=1, nobody=1),
    Case("key bias", (2, 35), q_counts=(2, 34), heads=1, dim=16, key_bias="mask", nobody=1),
    Case(
        "seeds",
        (18, 3, 0, 40),
        seeds=3,
        bias="float32",
        key_bias="mask",
        heads=1,
        dim=16,
        nobody=2,
    ),
    Case("more seeds", (20, 6), seeds=19, dim=8, heads=1, nobody=1),
    Case("many seeds", (20, 6), seeds=33, dim=8, heads=1),
    Case("large logits", (18, 11), logits=30.0),
)
# a long molecule from 40 rows on, keys of few seeds in parts of 32: molecules below, at, above
SCHEDULES = (
    Case("parts of seeds", (18, 0, 65, 33, 32), seeds=3, heads=1, dim=16, nobody=40),
    Case(
        "parts and options",
        (5, 65),
        seeds=2,
        bias="pair",
        key_bias="mask",
        dropout=0.3,
        lse=True,
    ),
    Case("far logits in parts", (70,), seeds=5, heads=1, logits=30.0),
    Case("far logits", (40,), heads=1, logits=30.0),
    Case("long ones", (39, 41, 5), heads=1, dim=16, nobody=40, lse=True),
)
# Other dtypes change casts, the depth of products and, float64, the tiles: not layouts. Of float16
# only what bfloat16 does not share, its range and its branch for large logits.
LEFT_OUT = {
    torch.bfloat16: {"more seeds"},
    torch.float64: {"many seeds"},
    torch.float16: {"edges", "other keys", "more seeds", "many seeds"},
}
# four blocks by four are enough, a block of all passes takes the interpreter half a second
SHORTER = {
    "longer": (97,),
    "key bias": (3, 0, 33),
    "forbidden keys": (6, 33),
    "key bias of seeds": (17, 33),
}
MATRIX = [
    (replace(case, counts=SHORTER.get(case.name, case.counts)), torch.float32)
    for case in testing.CASES
]
MATRIX += [
    (case, dtype)
    for dtype, names in LEFT_OUT.items()
    if not backend.why_not(Problem("cpu", dtype, 16, 16))
    for case in OF_DTYPES
    if case.name not in names
]


@pytest.mark.parametrize(
    ("case", "dtype"), MATRIX, ids=lambda x: getattr(x, "name", str(x).removeprefix("torch."))
)
def test_error_budget(case, dtype):
    testing.judge(case, dtype, run)


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(tile_table, "LONG", 40)
    monkeypatch.setattr(tile_table, "SPLIT", 32)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in SCHEDULES]
    + [(case, torch.bfloat16) for case in SCHEDULES[1::3]],
    ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")),
)
def test_error_budget_of_schedules(short_limits, case, dtype):
    testing.judge(case, dtype, run)


@pytest.mark.parametrize("kind", ["bias", "key_bias"])
@pytest.mark.parametrize("seeds", [None, 2])
def test_the_least_finite_bias_forbids_nothing(short_limits, seeds, kind):
    """It leaves no bit of the logits or of the sum in LSE: all keys weigh the same, as they do
    without it where q is 0. Half types have no norm of the weights but for this."""
    case = Case("least", (34,), q_counts=None if seeds else (33,), seeds=seeds, heads=1, lse=True)
    batch = case.make(torch.bfloat16)
    batch.q = torch.zeros_like(batch.q)
    found = []
    rows = 34 if kind == "key_bias" else 34 * (seeds or 33)
    for value in (0.0, torch.finfo(torch.float32).min):
        bias = torch.full((rows, 1), value)
        setattr(batch, kind, bias)
        setattr(batch, f"dd{kind}", torch.ones_like(bias))
        if kind == "bias":
            batch.pair_ptr = torch.tensor([0, rows])
        found.append(run(replace(batch)))
    assert (found[1].pop("lse") == torch.finfo(torch.float32).min).all() and found[0].pop(
        "lse"
    ).any()
    for name, x in found[1].items():
        torch.testing.assert_close(x, found[0][name], rtol=0.02, atol=0.02, msg=name)


EDITS = [
    ("_backward", "b_de += tl.sum(ds, 1)", "b_de = tl.sum(ds, 1)", "dkey_bias"),
    ("_double_backward", "b_ge += tl.sum(z, 1)", "b_ge = tl.sum(z, 1)", "gkey_bias"),
    ("_double_backward", "load_key_bias(t.ddkey_bias, at_n, by.c, 1)", "None", "gkey_bias"),
    ("_few_seeds", "share *= load_part", "load_part", "out"),
    ("_few_seeds_double", "H, tl.sum(z, 0))", "H, tl.sum(ds, 0))", "gkey_bias"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit[2])
def test_a_bug_in_the_text_is_noticed(short_limits, monkeypatch, tmp_path, edit):
    """One in what follows from a key bias, planted in a copy of a module of kernels."""
    name, right, wrong, seen_in = edit
    full = f"{backend.__name__}.{name}"
    text = inspect.getsource(importlib.import_module(full))
    assert text.count(right) == 1
    file = tmp_path / f"{name}.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(full, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, full, module)
    seeds = 2 if "few" in name else None
    case = Case("bugs", (33,), seeds=seeds, heads=1, key_bias="pair")
    with pytest.raises(AssertionError, match=seen_in):
        testing.judge(case, torch.float32, run)


@functools.cache
def first_order() -> tuple[testing.Batch, tuple]:
    """A batch and what its third pass takes before the tangents."""
    case = Case("some", (9, 33), heads=1, bias="pair", key_bias="pair", lse=True)
    batch = with_red_zones(case.make(torch.float32))
    x, options = operands(batch), Options(batch.scale)
    with guard(seed=1):
        y = backend.forward(x, options)
    return batch, (x, y, Cotangents(batch.dout, batch.dlse))


GIVEN = Tangents._fields


@pytest.mark.parametrize("left_out", [*GIVEN, "all"])
def test_cotangents_that_are_none_are_zero(left_out):
    batch, known = first_order()
    absent = batch.tangents
    names = GIVEN if left_out == "all" else (left_out,)
    zero = absent._replace(**{name: getattr(absent, name) * 0 for name in names})
    absent = absent._replace(**dict.fromkeys(names))
    with guard(seed=1):
        found = backend.double_backward(*known, absent, Options(batch.scale))
        expected = backend.double_backward(*known, zero, Options(batch.scale))
    for name, x, other in zip(found._fields, found, expected):
        torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-5, msg=name)


def operands(batch: testing.Batch) -> Operands:
    """Without dropout."""
    return Operands(*(getattr(batch, name) for name in Operands._fields))._replace(seed=None)


def test_unwanted_gradient_of_bias_is_empty():
    batch = Case("small", (3,), heads=2, bias="pair").make(torch.float32)
    x, options = operands(batch), Options(1.0)
    with guard():
        y = backend.forward(x, options)
        first = backend.backward(x, y, Cotangents(batch.dout, None), options, False)
    assert first.dbias.shape == (0, 2)


@pytest.mark.parametrize("name", ["forward", "backward", "double_backward"])
@pytest.mark.parametrize("seeds", [None, 2])
def test_opcheck(name, seeds):
    """torch's own checks of the registered operators, with this backend behind them; test_ops.py
    has those of their derivatives, which no backend changes."""
    case = Case("small", (3, 4), seeds=seeds, heads=1, bias="pair", key_bias="pair", lse=True)
    batch = case.make(torch.float32)
    x, options = operands(batch), Options(0.3)
    known = (*x, *backend.forward(x, options), batch.dout, batch.dlse)
    arguments = {
        "forward": (*x, *options),
        "backward": (*known, *options, True),
        "double_backward": (*known, *batch.tangents._replace(ddk=None), *options),
    }[name]
    checks = ("test_schema", "test_faketensor")
    operator = getattr(ops.PASSES[backend.OPERATORS], name)
    torch.library.opcheck(operator, arguments, test_utils=checks)


@triton.jit
def _bug_kernel(x, y, n, BUG: tl.constexpr):
    o = tl.program_id(0) * 16 + tl.arange(0, 16)
    if BUG == "load outside":
        tl.store(y + o, tl.load(x + o + 1), mask=o < n)
    elif BUG == "store outside":
        tl.store(y + o + 1, tl.load(x + o, mask=o < n, other=0.0))
    elif BUG == "two writers":
        tl.store(y + o % 16, tl.load(x + o, mask=o < n, other=0.0))
    elif BUG == "reads another's result":
        tl.store(y + o, tl.load(y + (o + 16) % 32))
    elif BUG == "atomic":
        tl.atomic_add(y + o, 1.0)
    elif BUG == "bfloat16 sum":
        z = tl.load(x + o).to(tl.bfloat16)
        tl.store(y + o, (z + z).to(tl.float32))
    elif BUG == "unwritten":
        tl.store(y + o, tl.load(x + o), mask=o < n - 1)


BUGS = {
    "load outside": "load of 1",
    "store outside": "store of 1",
    "two writers": "two programs",
    "reads another's result": "a program reads",
    "atomic": "atomics",
    "bfloat16 sum": "arithmetic",
}


@pytest.mark.parametrize("bug", BUGS)
def test_guard_sees(bug):
    with guard() as g, pytest.raises(GuardError, match=BUGS[bug]):
        _bug_kernel[(2,)](padded(torch.ones(32)), torch.empty(32), 32, BUG=bug)
    assert g.launches == 1


def test_guard_poisons_what_nobody_writes():
    with guard():
        y = torch.empty(32)
        _bug_kernel[(2,)](padded(torch.ones(32)), y, 32, BUG="unwritten")
    assert y.isnan().tolist() == [False] * 31 + [True]
