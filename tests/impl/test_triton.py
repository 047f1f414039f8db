"""The Triton backend as a citizen: reasons, lazy imports, launches; and the interpreted suite."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import attnpool_kernels.impl.triton as backend
from attnpool_kernels.dispatch import Problem

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
has_triton = not any(
    "triton" in reason for reason in backend.why_not(Problem("cuda", torch.float32, 8, 8))
)
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed, or too old")
H100 = {"device": "cuda", "dtype": torch.float32, "head_dim": 32, "value_dim": 32}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"capability": (9, 0), "grad_order": 2, "deterministic": True, "bias": True}, None),
        ({"dtype": torch.float64, "seeds": 4, "key_bias": True, "dropout": True}, None),
        ({"device": "cpu"}, "tensors on cpu: needs cuda"),
        ({"capability": (7, 5)}, "sm_75: needs sm_80"),
        ({"dtype": torch.float8_e4m3fn}, "needs float16"),
        ({"head_dim": 257}, "head dimension 257"),
        ({"value_dim": 300}, "value dimension 300"),
        ({"grad_order": 3}, "second order"),
    ],
)
@needs_triton
def test_reasons(change, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if change.get("dtype") == torch.float64 and backend.version() < backend._FLOAT64:
        reason = "float64: tl.dot needs triton"
    found = backend.why_not(Problem(**(H100 | change)))
    assert found == [] if reason is None else len(found) == 1 and reason in found[0]


@needs_triton
def test_amd_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    (found,) = backend.why_not(Problem(**H100))
    assert "never ran there" in found


def test_every_reason_is_listed(monkeypatch):
    monkeypatch.setattr(backend, "_why_no_triton", lambda: "triton is not installed")
    problem = Problem("cpu", torch.int8, 0, 512, capability=(6, 1))
    assert len(backend.why_not(problem)) == 6


def test_a_version_that_is_too_old_is_a_reason(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "3.5.1")
    caches = backend._why_no_triton, backend.version
    for cached in caches:
        cached.cache_clear()
    try:
        assert backend.why_not(Problem(**H100)) == ["needs triton >= 3.6, got 3.5.1"]
    finally:
        for cached in caches:
            cached.cache_clear()


@needs_triton
def test_float64_needs_a_triton_that_accumulates_it(monkeypatch):
    monkeypatch.setattr(backend, "version", lambda: (3, 7))
    found = backend.why_not(Problem(**(H100 | {"dtype": torch.float64})))
    assert found == ["float64: tl.dot needs triton >= 3.9"]


def test_triton_is_imported_by_a_call_only():
    code = "import sys, attnpool_kernels.impl.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@needs_triton
def test_unknown_capability_falls_back_with_one_warning():
    from attnpool_kernels.impl.triton import tile_table

    tile_table._known.cache_clear()
    with pytest.warns(UserWarning, match="no Triton tiles for sm_121, using those of sm_120"):
        assert tile_table.tile("forward", (12, 1), "bf16", 16, False) == (
            tile_table.tile("forward", (12, 0), "bf16", 16, False)
        )


@needs_triton
def test_both_of_torchs_settings_of_tf32():
    """In a process of its own: torch remembers which one was used."""
    code = """
import torch
from attnpool_kernels.impl.triton import tile_table
rows, matmul = [tile_table.precision(torch.float32)], torch.backends.cuda.matmul
matmul.allow_tf32 = True
rows.append(tile_table.precision(torch.float32))
matmul.allow_tf32 = False
rows.append(tile_table.precision(torch.float32))
torch.set_float32_matmul_precision("high")
rows.append(tile_table.precision(torch.float32))
for setting in "ieee", "tf32":
    matmul.fp32_precision = setting
    rows.append(tile_table.precision(torch.float32))
matmul.fp32_precision = "none"
rows.append(tile_table.precision(torch.float32))
torch.backends.fp32_precision = "tf32"
rows.append(tile_table.precision(torch.float32))
print(*rows)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["fp32", "tf32"] * 4, run.stderr


def recorded(counts, heads=2, dim=16, **options):
    """The launches of all passes for molecules of these sizes."""
    from tools import aot

    from attnpool_kernels.testing import Case, run_kernels

    found = []
    batch = Case("recorded", tuple(counts), heads=heads, dim=dim, **options).make(torch.bfloat16)
    with aot.as_device((9, 0), "bf16"), aot.on_launch(found.append):
        run_kernels(batch, backend)
    return found


@needs_triton
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "pair", "key_bias": "heads", "dropout": 0.2}, {"seeds": 4, "key_bias": "pair"}],
)
def test_lengths_never_compile_again(options):
    """Same signature, constants and alignment for any number of rows and molecules."""
    first = [launch.source().hash() for launch in recorded((5, 18), **options)]
    for counts in ((1,), (16,), (0, 3, 0), (7, 1, 17)):
        assert [launch.source().hash() for launch in recorded(counts, **options)] == first
    more = [launch.source().hash() for launch in recorded((16,) * 16, **options)]
    assert more == [launch.source().hash() for launch in recorded((130, 1, 277), **options)]


@needs_triton
def test_sizes_that_are_known_leave_out_what_nobody_needs():
    """By the kernels of forward and backward: (name, first row count that it serves)."""
    from tools import aot

    from attnpool_kernels import Ragged
    from attnpool_kernels.operands import Cotangents, Operands, Options, Result

    def names(counts, forget=False, rest=0):
        sets = Ragged.from_counts(counts)
        assert sets.sizes is not None
        if forget:
            sets.ptr += 0  # a new version
        q = torch.empty(sum(counts) + rest, 1, 64, dtype=torch.bfloat16)
        x = Operands.plain(q, q, q, sets.ptr, sets.ptr)
        found = []
        with aot.as_device((9, 0), "bf16"), aot.on_launch(found.append):
            y = backend.forward(x, Options(0.1))
            backend.backward(x, Result(*y), Cotangents(q, None), Options(0.1), False)
        assert all(
            launch.grid[0] == len(counts) + 2 for launch in found if launch.arguments["WALK"] == 1
        )
        return [(x.name.removesuffix("_kernel"), x.arguments["SHORTEST"]) for x in found]

    small = [("forward_forward", 0), ("backward_query", 0)]
    assert names((18,) * 40) == small and names((3, 32), rest=9) == small
    assert names((55,) * 40) == small and names((256, 300))[0] == ("forward_forward", 0)
    assert names((256, 300)) == [*small, ("backward_key", 0)]
    assert len(names((18,) * 40, forget=True)) == 9
    assert [start for _, start in names((18, 300))] == [0, 33, 256] * 3
    assert names((18, 55)) == [(x, y) for x, _ in small for y in (0, 33)]
    assert names((18,), rest=60)[:2] == [("forward_forward", 0), ("forward_forward", 33)]


@needs_triton
def test_grids_are_one_dimensional_and_small():
    counts = (0, 1) * 35000
    for launch in recorded(counts, heads=1):
        rows, molecules = sum(counts), len(counts)
        assert len(launch.grid) == 1
        assert launch.grid[0] <= rows // 16 + molecules + 2


@needs_triton
@pytest.mark.parametrize("seeds", [None, 3])
def test_one_kernel_does_small_molecules(seeds):
    """A recorded launch names the queries up to which the key kernel leaves a molecule alone."""
    for launch in recorded((4,), seeds=seeds):
        if launch.name.endswith("key_kernel"):
            assert launch.arguments["COMPLETE"] == 32


@needs_triton
def test_compiles_on_cuda_without_a_graph_break(monkeypatch):
    """Fake CUDA tensors: the whole path is one graph, with this backend's name as a constant.

    Without autograd, whose C++ side needs a device guard that a torch without CUDA lacks.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if torch.__version__ < "2.11":
        pytest.skip("torch 2.10 cannot trace its own FakeTensorMode (a logger inside)")
    from attnpool_kernels import seed_pool, set_attention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=keep)
    def model(x, seeds, bias, key_bias, ptr):
        x = set_attention(x, x, x, ptr, bias=bias, key_bias=key_bias, dropout=0.1)
        return seed_pool(seeds, x, x, ptr, key_bias=key_bias)

    with FakeTensorMode():
        seeds, bias = torch.empty(3, 2, 16, device="cuda"), torch.empty(50, 2, device="cuda")
        for rows, molecules in ((10, 3), (24, 6)):
            x = torch.empty(rows, 2, 16, device="cuda")
            of_keys = torch.empty(rows, 2, device="cuda")
            ptr = torch.zeros(molecules + 1, dtype=torch.int64, device="cuda")
            out = model(x, seeds, bias, of_keys, ptr)
            assert out.shape == (molecules, 3, 2, 16) and out.device.type == "cuda"
    assert len(graphs) == 1
    calls = [n for n in graphs[0].graph.nodes if "attnpool" in str(n.target)]
    assert [str(call.target) for call in calls] == ["attnpool_triton.attention.default"] * 2


def interpreted(name: str) -> None:
    """Runs a file of tests in a process that interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / name],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_interpreted_suite():
    interpreted("test_triton_interpreted.py")
