"""The CUDA kernels on the CPU: every pass and dtype against the float64 oracle, and promises.

The kernels are the shipped source, compiled by g++ with emulated threads, barriers, shuffles and
tensor cores (tests/csrc). Timing, and what only a GPU can show, is not tested here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tools import cuda_host

from attnpool_kernels import BackendError, Problem, dispatch, impl, testing

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [case for case in testing.CASES if max(case.dim, case.value_dim or 0) <= 128]
EDGES = [
    testing.Case("half tiles", (1, 15, 16, 17), heads=3, dim=32),
    testing.Case("two tiles", (31, 32, 33, 0, 1), heads=2, dim=40, value_dim=64, nobody=35),
    testing.Case("whole tiles", (63, 64, 65), heads=1, dim=64, bias="pair", lse=True),
    testing.Case("widest tiles", (16, 17, 33), heads=1, dim=128, value_dim=128, lse=True),
    testing.Case("more keys", (65, 3), q_counts=(2, 66), heads=1, dim=16, dropout=0.2),
    testing.Case("large of seeds", (70, 5), seeds=17, heads=1, dim=16, bias="pair", lse=True),
    testing.Case("keys without queries", (9, 70, 3), q_counts=(0, 0, 5), key_bias="pair", nobody=4),
    testing.Case("seeds of many", (3,) * 130, seeds=9, heads=1, dim=4),
]
MIXED = testing.Case(
    "mixed",
    (18, 0, 33, 1, 70),
    heads=2,
    dim=16,
    bias="pair",
    key_bias="pair",
    lse=True,
    nobody=5,
)
# Few seeds have kernels and tests of their own: test_cuda_few_seeds.py.
SEEDS = testing.Case(
    "seeds",
    (18, 0, 70, 1),
    seeds=9,
    heads=2,
    dim=16,
    bias="pair",
    key_bias="float32",
    lse=True,
)


@pytest.fixture(scope="module")
def module():
    return cuda_host.build()


def bits(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Comparable with torch.equal, NaN included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: x.contiguous().view(kind[x.element_size()]) for name, x in result.items()}


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    one, other = bits(one), bits(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *EDGES], ids=lambda case: case.name)
def test_budget(module, case, dtype):
    kernels = cuda_host.Kernels(module)
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [MIXED, SEEDS], ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_schedule_or_on_16_byte_loads(module, case, dtype):
    batch = case.make(dtype)
    expected = testing.run_kernels(batch, cuda_host.Kernels(module))
    for schedule in (1, 2, 3, 4):
        kernels = cuda_host.Kernels(module, schedule, vector=schedule % 2 == 0)
        assert not different(expected, testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seeds", [None, 9])
def test_a_molecule_has_the_same_bits_alone_and_in_a_batch(module, dtype, seeds):
    kernels = cuda_host.Kernels(module)
    for counts in ((5, 33, 18), (33, 64, 33), (1, 70)):
        case = replace(MIXED, counts=counts, seeds=seeds, nobody=0, bias=None)
        batch = case.make(dtype)
        together = testing.run_kernels(batch, kernels)
        k_first = sum(counts[:1])
        rows = slice(k_first, k_first + counts[1])
        q_rows = rows if seeds is None else slice(None)
        o_rows = rows if seeds is None else slice(1, 2)
        ptr = torch.tensor([0, counts[1]])
        alone = replace(
            batch,
            case=replace(case, counts=counts[1:2]),
            q=batch.q[q_rows],
            k=batch.k[rows],
            v=batch.v[rows],
            key_bias=batch.key_bias[rows],
            q_ptr=None if seeds else ptr,
            k_ptr=ptr,
            dout=batch.dout[o_rows],
            dlse=batch.dlse[o_rows],
            ddq=batch.ddq[q_rows],
            ddk=batch.ddk[rows],
            ddv=batch.ddv[rows],
            ddkey_bias=batch.ddkey_bias[rows],
        )
        found = testing.run_kernels(alone, kernels)
        of_rows = {"out": o_rows, "lse": o_rows, "gdout": o_rows, "gdlse": o_rows}
        cut = {name: x[of_rows.get(name, rows)] for name, x in together.items()}
        if seeds is not None:  # these are sums over the molecules
            del cut["dq"], cut["gq"]
        assert not different(cut, found)


@pytest.mark.parametrize("case", [MIXED, replace(SEEDS, bias=None)], ids=lambda case: case.name)
def test_a_nan_stays_in_its_molecule(module, case):
    kernels = cuda_host.Kernels(module)
    batch = case.make(torch.float32)
    expected = testing.run_kernels(batch, kernels)
    bad = 2 if case.seeds is None else 0
    first = sum(case.counts[:bad])
    rows = slice(first, first + case.counts[bad])
    for x in (batch.k, batch.v):
        x[rows] = float("nan")
    found = testing.run_kernels(batch, kernels)
    for name, x in found.items():
        if name in ("dbias", "gbias") or (case.seeds and name in ("dq", "gq")):
            continue
        by_molecule = case.seeds and name in ("out", "lse", "gdout", "gdlse")
        inside = slice(bad, bad + 1) if by_molecule else rows
        assert x[inside].isnan().any()
        clean, same = x.clone(), expected[name].clone()
        clean[inside] = same[inside] = 0
        assert torch.equal(clean, same), name


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_of_nobody_are_zero(module, index):
    case = replace(MIXED, index=index)
    batch = case.make(torch.float32)
    before = 3  # rows before the first molecule too: no check on CUDA rules them out
    pad = torch.full((before, 2, 16), float("nan"))
    for name in ("q", "k", "v", "dout", "ddq", "ddk", "ddv"):
        setattr(batch, name, torch.cat([pad, getattr(batch, name)]))
    for name in ("dlse", "key_bias", "ddkey_bias"):
        setattr(batch, name, torch.cat([pad[..., 0], getattr(batch, name)]))
    batch.q_ptr = batch.k_ptr = batch.k_ptr + before
    rows = sum(case.counts)
    for name, x in testing.run_kernels(batch, cuda_host.Kernels(module)).items():
        assert not x.isnan().any(), name
        if name not in ("dbias", "gbias"):
            nobody = torch.cat([x[:before], x[before + rows :]])
            assert (nobody == (-torch.inf if name == "lse" else 0)).all(), name


def test_keys_that_no_seed_asks_get_gradient_zero(module):
    case = replace(SEEDS, seeds=0, bias=None, nobody=4)
    result = testing.run_kernels(case.make(torch.bfloat16), cuda_host.Kernels(module))
    for name in ("dk", "dv", "dkey_bias", "gk", "gv", "gkey_bias"):
        assert len(result[name]) == sum(case.counts) + 4 and (result[name] == 0).all(), name


def test_absent_cotangents_are_zero(module):
    cuda_host.compare_absent_cotangents(cuda_host.Kernels(module), MIXED.make(torch.float32))


def test_rows_of_bias_behind_the_last_molecule_get_gradient_zero(module):
    batch = MIXED.make(torch.float32)
    more = torch.zeros(7, 2)
    batch.bias, batch.ddbias = torch.cat([batch.bias, more]), torch.cat([batch.ddbias, more])
    result = testing.run_kernels(batch, cuda_host.Kernels(module))
    for name in ("dbias", "gbias"):
        assert result[name].isfinite().all() and (result[name][-7:] == 0).all()


def garbage() -> list[testing.Batch]:
    """Boundaries that no check has seen, as on CUDA. The kernels may not leave the tensors."""
    batches = []
    for case in (MIXED, SEEDS, replace(SEEDS, seeds=3)):
        for values in ([7, -5, 2**31 - 1, 3, -(2**31), 90], [200, 1, 0, 50, 20, 10], [-1] * 6):
            batch = case.make(torch.float32)
            ptr = torch.tensor(values[: batch.k_ptr.numel()])
            batch.k_ptr = ptr
            batch.q_ptr = None if case.seeds else ptr
            batch.pair_ptr = ptr * 1000
            batches.append(batch)
    return batches


def test_garbage_boundaries_stay_inside(module):
    for batch in garbage():
        testing.run_kernels(batch, cuda_host.Kernels(module, split=32))


def test_public_functions_and_both_derivatives(module, monkeypatch):
    monkeypatch.setitem(impl._loaded, "cuda", cuda_host.registered(cuda_host.Kernels(module)))
    monkeypatch.setattr(dispatch, "_chosen", {})
    testing.check_backend("cuda", torch.float32, cases=[CASES[0], MIXED, SEEDS])


def test_why_not():
    cuda = impl.load("cuda")
    good = Problem("cuda", torch.bfloat16, 64, 64, capability=(9, 0), grad_order=2)
    only_library = cuda.why_not(good)
    assert len(only_library) <= 1  # nothing against the problem itself
    for bad, text in (
        (replace(good, device="cpu"), "needs cuda"),
        (replace(good, capability=(7, 5)), "sm_75: needs sm_80"),
        (replace(good, head_dim=129), "head dimension 129"),
        (replace(good, value_dim=256), "value dimension 256"),
        (replace(good, dtype=torch.int8), "int8"),
        (replace(good, dtype=torch.float64, capability=(8, 6)), "float64"),
    ):
        assert len(cuda.why_not(bad)) == len(only_library) + 1
        assert any(text in reason for reason in cuda.why_not(bad))
    if not torch.version.cuda:
        with pytest.raises(BackendError, match="CUDA library"):
            dispatch.select(good, "cuda")


def test_a_kernel_asks_each_device_once_and_leaves_no_error_behind(module):
    """A refusal is returned to its own call, cleared (the next launch would report it), retried."""
    assert module.ask_devices([0, 0, 1, 0, 1], [0, 0]) == ([0, 0, 0, 0, 0], 2, 0)
    assert module.ask_devices([0, 0, 0], [98, 0]) == ([98, 0, 0], 2, 1)
    assert module.ask_devices([70, 70], [0, 0]) == ([0, 0], 2, 0)  # beyond the 64 remembered


@pytest.mark.parametrize("value", [3.4e38, torch.inf, -torch.inf])
@pytest.mark.parametrize("seeds", [None, 9, 2])
def test_largest_floats_and_infinities_in_float32(module, seeds, value):
    """Products of split float32: parts of a large float stay finite, those of infinity are it."""
    case = testing.Case("two", (5, 18), seeds=seeds, heads=1, dim=16, logits=0.1)
    batch = case.make(torch.float32)
    batch.v[2, 0, 3] = value
    kernels = cuda_host.Kernels(module)
    out, _ = kernels.forward(batch.operands, batch.options)
    finite = batch.v.nan_to_num(0.0, 0.0, 0.0)  # the oracle multiplies other molecules by 0
    expected, _ = testing.dense(batch, torch.float64, batch.inputs() | {"v": finite})
    own = (slice(0, 5) if seeds is None else slice(0, 1), ..., 0, 3)
    if abs(value) == torch.inf:
        assert (out[own] == value).all()
        out[own] = expected[own] = 0
    assert out.isfinite().all()
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)
