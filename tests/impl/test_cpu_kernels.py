"""The C++ CPU kernels called directly: every vector width and pass, and what they must refuse."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnpool_kernels import set_attention, testing
from attnpool_kernels.impl import cpu
from attnpool_kernels.operands import Operands, Options, Tangents
from attnpool_kernels.testing import Case

if cpu.load():
    pytest.skip(cpu.load(), allow_module_level=True)

OPS = torch.ops.attnpool
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def default_width():
    yield
    OPS._use_isa("")


def test_outputs_are_poisoned():
    """Without this the other tests would not see an element that is never written."""
    assert torch.empty(8).isnan().all()


def test_the_baseline_runs_everywhere():
    """The tests of a width are skipped where that does not run."""
    OPS._use_isa("baseline")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cases(width, dtype):
    testing.check_kernels(cpu, dtype)


BLOCKS = (
    Case("blocks", (129, 64, 260, 5), heads=1, dim=16, lse=True, nobody=2),
    Case("wide blocks", (70, 140), heads=1, dim=144, value_dim=20),
    Case("other keys", (3, 300, 0, 140), q_counts=(200, 9, 7, 65), heads=2, dim=4, bias="mask"),
    Case("dropout", (150, 131), heads=1, dim=8, dropout=0.4, lse=True),
    Case("seeds", (150, 20, 700), seeds=70, heads=1, dim=8, bias="pair"),
    Case("one seed", (700, 3), seeds=1, heads=2, dim=32),
    Case("key bias", (129, 260, 5), q_counts=(200, 70, 9), dim=16, key_bias="mask", lse=True),
    Case("both biases", (150, 131), heads=1, bias="pair", key_bias="float32", dropout=0.4),
    Case("key bias of seeds", (300, 20), seeds=70, heads=1, key_bias="pair"),
    Case("frequencies", (5, 33), heads=1, dim=320, value_dim=64, key_bias="pair"),
)


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_blocks(width, case, dtype):
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, cpu))


def test_parts_of_a_large_molecule():
    """Beyond 2,048 keys the gradients of q and dout are summed from parts, beyond 1,024 queries the
    forward pass is cut."""
    case = Case("parts", (3, 2200), heads=1, dim=4, value_dim=3, key_bias="pair")
    testing.judge(case, torch.float64, lambda batch: testing.run_kernels(batch, cpu))


def test_parts_of_large_molecules_in_a_large_batch():
    """A molecule is cut into parts in any batch.

    More than 8 per thread would share tasks if they were small; those that did had zero gradients.
    """
    torch.set_num_threads(1)
    case = Case("many parts", (2100,) * 17, q_counts=(64,) * 17, heads=1, dim=4, lse=True)
    batch = case.make(torch.float32)
    whole = testing.run_kernels(batch, cpu)
    fields = {
        name: getattr(batch, name)[: 2100 if name in ("k", "v", "ddk", "ddv") else 64]
        for name in ("q", "k", "v", "ddq", "ddk", "ddv", "dout", "dlse")
    }
    one = replace(batch, q_ptr=batch.q_ptr[:2], k_ptr=batch.k_ptr[:2], **fields)
    for name, x in testing.run_kernels(one, cpu).items():
        assert torch.equal(x, whole[name][: len(x)]), name


SIZES = (17, 0, 1, 64, 65, 129, 3, 40)


def molecule(batch, index):
    """The batch that consists of one molecule of it."""
    counts = batch.case.counts
    rows = slice(sum(counts[:index]), sum(counts[: index + 1]))
    ptr = torch.tensor([0, counts[index]])
    fields = {}
    for name in ("q", "k", "v", "ddq", "ddk", "ddv", "dout", "dlse"):
        fields[name] = getattr(batch, name)[rows].clone()
    if batch.key_bias is not None:
        fields |= {"key_bias": batch.key_bias[rows], "ddkey_bias": batch.ddkey_bias[rows]}
    if batch.q_ptr is None:
        fields |= {"q": batch.q, "ddq": batch.ddq}
        fields |= {"dout": batch.dout[index : index + 1], "dlse": batch.dlse[index : index + 1]}
    if batch.bias is not None:
        pairs = slice(*batch.pair_ptr[index : index + 2].tolist())
        fields |= {"bias": batch.bias[pairs].clone(), "ddbias": batch.ddbias[pairs].clone()}
        fields["pair_ptr"] = batch.pair_ptr[index : index + 2] - batch.pair_ptr[index]
    case = replace(batch.case, counts=(counts[index],), nobody=0)
    q_ptr = None if batch.q_ptr is None else ptr
    return replace(batch, case=case, q_ptr=q_ptr, k_ptr=ptr, **fields), rows


@pytest.mark.parametrize("seeds", [None, 3], ids=("queries", "seeds"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_alone_and_in_any_batch_and_threads(width, dtype, seeds):
    case = Case("bits", SIZES, heads=3, dim=32, seeds=seeds, bias="pair", key_bias="pair", lse=True)
    batch = case.make(dtype)
    torch.set_num_threads(3)
    whole = testing.run_kernels(batch, cpu)
    torch.set_num_threads(1)
    again = testing.run_kernels(batch, cpu)
    for name, x in whole.items():
        assert torch.equal(x, again[name]), f"{name} depends on the number of threads"
    for index in range(len(SIZES)):
        one, rows = molecule(batch, index)
        alone = testing.run_kernels(one, cpu)
        pairs = slice(*batch.pair_ptr[index : index + 2].tolist())
        for name, x in alone.items():
            place = pairs if name in ("dbias", "gbias") else rows
            if seeds:
                if name in ("dq", "gq"):
                    continue  # sums over molecules
                if name in ("out", "lse", "gdout", "gdlse"):
                    place = slice(index, index + 1)
            assert torch.equal(x, whole[name][place]), f"{name} of molecule {index}"


def test_d_seeds_do_not_depend_on_threads():
    case = Case("many", tuple(i % 23 for i in range(300)), heads=2, dim=16, seeds=4)
    batch = case.make(torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(testing.run_kernels(batch, cpu))
    for name in ("dq", "gq"):
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])


@pytest.mark.parametrize("seeds", [None, 2], ids=("queries", "seeds"))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_molecule(width, seeds, value):
    case = Case("nan", (5, 18, 130, 7), heads=2, dim=24, seeds=seeds, lse=True)
    batch = case.make(torch.float32)
    clean = testing.run_kernels(batch, cpu)
    for bad in range(4):
        _, rows = molecule(batch, bad)
        fields = {name: getattr(batch, name).clone() for name in ("k", "v", "ddk", "ddv")}
        fields |= {name: getattr(batch, name).clone() for name in ("q", "ddq", "dout", "dlse")}
        for name, x in fields.items():
            if seeds is None or name in ("k", "v", "ddk", "ddv"):
                x[rows] = value
            elif name in ("dout", "dlse"):
                x[bad] = value
        found = testing.run_kernels(replace(batch, **fields), cpu)
        for name, x in found.items():
            if seeds and name in ("dq", "gq"):
                continue
            by_molecule = seeds and name in ("out", "lse", "gdout", "gdlse")
            for other in set(range(4)) - {bad}:
                place = slice(other, other + 1) if by_molecule else molecule(batch, other)[1]
                assert torch.equal(x[place], clean[name][place]), (name, bad, other)


def test_rows_of_nobody_are_zero_whatever_they_hold(width):
    case = Case("nobody", (4, 0, 9), heads=2, dim=8, nobody=3, lse=True)
    batch = case.make(torch.float32)
    for x in (batch.q, batch.k, batch.v, batch.dout, batch.ddq, batch.ddk, batch.ddv, batch.dlse):
        x[13:] = float("nan")
    for name, x in testing.run_kernels(batch, cpu).items():
        assert x[:13].isfinite().all()
        assert (x[13:] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("seeds", [None, 2], ids=("queries", "seeds"))
def test_forbidden_rows_are_zero_whatever_they_meet(width, seeds):
    """A molecule whose bias is -inf everywhere gives exact zeros, even from NaN."""
    case = Case("forbidden", (6, 140, 3), heads=2, dim=8, bias="pair", seeds=seeds, lse=True)
    batch = case.make(torch.float32)
    first, last = batch.pair_ptr[1:3].tolist()
    batch.bias[first:last] = -torch.inf
    sum_rows = slice(0, 0) if seeds else slice(6, 146)
    for x in (batch.v, batch.ddv):
        x[6:146] = float("nan")
    batch.dout[1 if seeds else slice(6, 146)] = float("nan")
    batch.dlse[1 if seeds else slice(6, 146)] = float("nan")
    for name, x in testing.run_kernels(batch, cpu).items():
        if "bias" in name:
            place = slice(first, last)
        elif seeds and name in ("out", "lse", "gdout", "gdlse"):
            place = slice(1, 2)
        elif seeds and name in ("dq", "gq"):
            place = sum_rows
            assert x.isfinite().all()
        else:
            place = slice(6, 146)
        assert (x[place] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_in_and_out(width, dtype):
    """Every bit pattern is read and written; sums are rounded to nearest even."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    v = every.reshape(-1, 1, 16)
    ptr = torch.arange(v.shape[0] + 1)
    q = torch.zeros(v.shape[0], 1, 1, dtype=dtype)
    out = OPS.attention(*Operands.plain(q, q, v, ptr, ptr), 1.0, 0.0)[0]
    assert torch.equal(out.nan_to_num(1.0, 2.0, 3.0), v.nan_to_num(1.0, 2.0, 3.0))
    assert torch.equal(out.isnan(), v.isnan())
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (4096, 1, 16), generator=generator, dtype=torch.int32)
    v = bits.to(torch.int16).view(dtype).nan_to_num(1.0, 2.0, 3.0)
    largest = torch.finfo(dtype).max / 2  # values are summed before they are divided by the weights
    v = v.clamp(-largest, largest)
    q = torch.zeros(4096, 1, 1, dtype=dtype)
    ptr = torch.arange(0, 4097, 2)
    out = OPS.attention(*Operands.plain(q, q, v, ptr, ptr), 1.0, 0.0)[0]
    mean = ((v[0::2].float() * 0.5) + (v[1::2].float() * 0.5)).to(dtype)
    assert torch.equal(out[0::2], mean)


def garbage():
    low, high = -(2**63), 2**63 - 1
    return [
        [1, 2, 6],
        [0, 4, 3],
        [0, -1, 6],
        [0, 3, 7],
        [0, low, 6],
        [0, high, 6],
        [0, high, low],
        [low, 0, 6],
        [high, high, high],
        [0, 3, high],
        [-1, 0, 6],
    ]


@pytest.mark.parametrize("ptr", garbage(), ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_garbage_boundaries_raise(ptr, index):
    bounds = torch.iinfo(index)
    ptr = torch.tensor([min(max(x, bounds.min), bounds.max) for x in ptr], dtype=index)
    good = torch.tensor([0, 2, 6], dtype=index)
    x = torch.zeros(6, 1, 4)
    lse = torch.zeros(6, 1)
    for q_ptr, k_ptr in ((ptr, ptr), (ptr, good), (good, ptr), (None, ptr)):
        operands = Operands.plain(x, x, x, q_ptr, k_ptr)
        with pytest.raises(RuntimeError, match="ptr must"):
            OPS.attention(*operands, 1.0, 0.0)
        if q_ptr is None:
            continue
        known = (*operands, x, lse, x, None)
        with pytest.raises(RuntimeError, match="ptr must"):
            OPS.attention_backward(*known, 1.0, 0.0, False)
        with pytest.raises(RuntimeError, match="ptr must"):
            OPS.attention_double_backward(*known, *Tangents(None, None, None), 1.0, 0.0)
    assert OPS.check_ptr(ptr, 6) != 0
    assert OPS.check_ptr(good, 6) == 0


def test_check_ptr_names_the_rule():
    assert OPS.check_ptr(torch.tensor([2, 3]), 9) == 1
    assert OPS.check_ptr(torch.tensor([0, 3, 5, 4, 9]), 9) == 4 * 2 + 2
    assert OPS.check_ptr(torch.tensor([0, 3, 10]), 9) == 4 * 2 + 3
    assert OPS.check_ptr(torch.tensor([0]), 0) == 0
    assert OPS.check_ptr(torch.tensor([], dtype=torch.int32), 0) == 0


def test_wrong_pair_offsets_raise():
    rows, ptr = torch.zeros(6, 1, 4), torch.tensor([0, 2, 6])
    x = Operands.plain(rows, rows, rows, ptr, ptr)._replace(bias=torch.zeros(20, 1))
    for pair_ptr in ([0, 4, 21], [1, 4, 20], [0, 20, 20], [0, -4, 12], [0, 2**62, 20]):
        with pytest.raises(RuntimeError, match="pair_ptr must"):
            OPS.attention(*x._replace(pair_ptr=torch.tensor(pair_ptr)), 1.0, 0.0)


def test_wrong_arguments_raise():
    x, ptr, lse = torch.zeros(6, 2, 4), torch.tensor([0, 2, 6]), torch.zeros(6, 2)
    good = {
        "q": x,
        "k": x,
        "v": x,
        "bias": None,
        "key_bias": None,
        "q_ptr": ptr,
        "k_ptr": ptr,
        "pair_ptr": None,
        "seed": None,
    }
    more = {"out": x, "lse": lse, "dout": x, "dlse": lse}
    third = {"ddq": x, "ddk": x, "ddv": x, "ddbias": None, "ddkey_bias": None}
    bias, pair_ptr = torch.zeros(20, 2), torch.tensor([0, 4, 20])
    wrong = [
        {"q": x[0]},
        {"q": x[:, :1]},
        {"q": x[:, :, :3]},
        {"q": x.long()},
        {"q": x.half()},
        {"k": x[:5]},
        {"k": x[None]},
        {"v": x[:5]},
        {"v": x[:, :1]},
        {"v": x[:, :, :0]},
        {"q": x[:, :, :0], "k": x[:, :, :0]},
        {"q": torch.zeros(6, 2, 513)},
        {"k_ptr": ptr.float()},
        {"k_ptr": ptr[:2]},
        {"k_ptr": ptr[:0]},
        {"k_ptr": ptr[None]},
        {"k_ptr": ptr.int()},
        {"q_ptr": ptr.repeat(2)[::2]},
        {"bias": bias},
        {"pair_ptr": pair_ptr},
        {"bias": bias[:, :1], "pair_ptr": pair_ptr},
        {"bias": bias.double(), "pair_ptr": pair_ptr},
        {"bias": bias[0], "pair_ptr": pair_ptr},
        {"bias": bias, "pair_ptr": pair_ptr.int()},
        {"bias": bias, "pair_ptr": pair_ptr[:2]},
        {"key_bias": lse[:5]},
        {"key_bias": lse[:, :1]},
        {"key_bias": lse[:, 0]},
        {"key_bias": lse.double()},
        {"key_bias": lse.to("meta")},
        {"seed": torch.zeros(1, dtype=torch.int64)},
        {"k": x.to("meta")},
        {"dropout": 0.5},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"dropout": 0.5, "seed": torch.zeros(2, dtype=torch.int64)},
        {"dropout": 0.5, "seed": torch.zeros(1)},
    ]
    wrong_more = [
        {"out": x[:5]},
        {"out": x.half()},
        {"lse": lse.double()},
        {"lse": lse[:5]},
        {"lse": x},
        {"dout": x[:, :, :3]},
        {"dlse": lse[:, :1]},
        {"dlse": lse.half()},
    ]
    wrong_third = [{"ddq": x[:5]}, {"ddk": x[0]}, {"ddv": x.double()}, {"ddbias": bias}]
    wrong_third += [{"ddkey_bias": lse}, {"ddkey_bias": lse[:5], "key_bias": lse}]
    options = {"scale": 1.0, "dropout": 0.0}
    assert OPS.attention(**good, **options)[0].shape == x.shape
    for change in wrong:
        with pytest.raises((RuntimeError, NotImplementedError)):
            OPS.attention(**(good | options | change))
    for change in wrong + wrong_more:
        with pytest.raises((RuntimeError, NotImplementedError)):
            OPS.attention_backward(**(good | more | options | change), need_dbias=False)
    for change in wrong + wrong_more + wrong_third:
        with pytest.raises((RuntimeError, NotImplementedError)):
            OPS.attention_double_backward(**(good | more | third | options | change))


def test_absent_cotangents_are_zero(width):
    batch = Case("absent", (6, 140), heads=2, dim=8, bias="pair").make(torch.float64)
    x, dy, options = batch.operands, batch.cotangents, Options(0.5)
    y = cpu.forward(x, options)
    for absent in range(16):
        masks = [bool(absent >> i & 1) for i in range(4)]
        given, zeros = (
            Tangents(*(other(t) if gone else t for gone, t in zip(masks, batch.tangents)))
            for other in (lambda t: None, torch.zeros_like)
        )
        found = cpu.double_backward(x, y, dy, given, options)
        expected = cpu.double_backward(x, y, dy, zeros, options)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


MEMORY = """
import resource, torch
from attnpool_kernels.impl import cpu
from attnpool_kernels.operands import Cotangents, Operands, Options, Tangents
torch.set_num_threads(2)
n = 8192
q, k, v, dout = (torch.randn(n, 2, 16) for _ in range(4))
ptr = torch.tensor([0, n])
cpu.load()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x, dy = Operands.plain(q, k, v, ptr, ptr), Cotangents(dout, None)
options = Options(0.25)
y = cpu.forward(x, options)
cpu.backward(x, y, dy, options, False)
cpu.double_backward(x, y, dy, Tangents(q, k, v), options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_atoms():
    """One matrix of pairs of 8,192 atoms and two heads has 512 MiB; all passes stay far below."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64 * 1024


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="no large pages here"
)
def test_large_outputs_ask_for_large_pages():
    """Each small page of fresh memory costs a fault, together more than a forward pass."""
    rows = 20_000
    q = torch.ones(rows, 2, 64, requires_grad=True)  # 10 MB
    out = set_attention(q, q.detach(), q.detach(), torch.arange(0, rows + 1, 4))
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out), create_graph=True)
    cotangent = torch.ones_like(dq)
    (gq,) = torch.autograd.grad(dq, q, cotangent)
    for x in (out, dq, gq):
        assert "hg" in _flags(x.data_ptr() + (6 << 20)), "not advised"
    assert "hg" not in _flags(id(rows))


def _flags(address: int) -> list[str]:
    """What the kernel notes of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            first, last = (int(x, 16) for x in words[0].split("-"))
            inside = first <= address < last
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError("not mapped")
