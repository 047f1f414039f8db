"""The choice of a backend: reasons, order, refusal, never a silent replacement."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from attnpool_kernels import (
    BackendError,
    Problem,
    Ragged,
    backends,
    dispatch,
    explain,
    impl,
)
from attnpool_kernels import (
    problem as problems,
)
from attnpool_kernels.operands import Operands

FORCES = Problem("cpu", torch.float32, 32, 32, grad_order=2)
GPU = Problem("cuda", torch.bfloat16, 32, 32, capability=(9, 0), grad_order=2)


def test_reference_serves_everything():
    for device in ("cpu", "cuda", "mps"):
        problem = Problem(device, torch.float32, 999, 1, bias=True, dropout=True, grad_order=3)
        assert dispatch.select(problem).__name__.endswith("reference")


def test_automatic_choice_is_right_to_second_order():
    chosen = dispatch.select(FORCES)
    assert chosen.KIND == "kernel" or chosen.GRAD_ORDER >= 2


def test_every_reason_is_listed():
    reasons = impl.load("sdpa").why_not(
        Problem("cpu", torch.float32, 8, 8, dropout=True, grad_order=2, return_lse=True)
    )
    assert len(reasons) == 3


def test_named_backend_is_used_or_refused():
    assert dispatch.select(FORCES, "reference").__name__.endswith("reference")
    with pytest.raises(BackendError, match=r"'cpu' cannot serve.*on cuda: needs cpu"):
        dispatch.select(GPU, "cpu")


def test_first_able_backend_of_the_table_is_chosen():
    for problem in (FORCES, GPU):
        table = dispatch.table(problem)
        (chosen,) = (line.split()[0] for line in table.splitlines() if "  *  " in line)
        assert dispatch.select(problem).__name__.endswith(chosen)


def test_no_backend(monkeypatch):
    monkeypatch.setattr(impl.load("reference"), "why_not", lambda problem: ["closed"])
    problem = Problem("mps", torch.float32, 8, 8, grad_order=2, dropout=True, return_lse=True)
    with pytest.raises(BackendError, match=r"(?s)no backend.*closed"):
        dispatch.select(problem)


def test_a_machine_that_is_not_here(capsys):
    explain(GPU)
    text = capsys.readouterr().out
    assert "capability=(9, 0)" in text and "cpu" in text and text.count("*") == 1


def test_backends_lists_names():
    assert backends() == impl.PRIORITY and "reference" in backends()


@pytest.mark.timing
def test_import_is_cheap_and_clean():
    """A fresh process: no optional package, and a small share of what importing torch takes.

    1 to 2% of it was measured; processor time, since the machine may have other work.
    """
    code = (
        "import sys, time; start = time.process_time(); import torch; before = set(sys.modules);"
        "middle = time.process_time(); import attnpool_kernels; end = time.process_time();"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert not new & {'triton', 'xformers', 'flash_attn', 'torch_geometric'}, new;"
        "print((end - middle) / (middle - start))"
    )
    shares = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(shares) < 0.06, shares


def both_gpu_backends(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setattr(impl.load(name), "why_not", lambda problem: [])
    monkeypatch.setattr(dispatch, "_chosen", {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "cuda"),
        ({"small_sets": False}, "triton"),
        ({"deterministic": True}, "triton"),
        ({"dtype": torch.float64}, "triton"),
        ({"value_dim": 72}, "triton"),
        ({"head_dim": 20}, "triton"),  # rows of 40 bytes
        ({"head_dim": 20, "value_dim": 20, "dtype": torch.float32}, "cuda"),
        ({"seeds": 8}, "triton"),
        ({"seeds": 9}, "cuda"),
    ],
)
def test_small_sets_go_to_the_kernels_made_for_them(change, expected, monkeypatch):
    both_gpu_backends(monkeypatch)
    given = replace(GPU, **({"small_sets": True} | change))
    assert dispatch.select(given).__name__.endswith(expected)
    first, *_ = (line for line in dispatch.table(given).splitlines() if "  *  " in line)
    assert first.split()[0] == expected and ("small" in first) == (expected == "cuda")


def operands(counts, rows=None, seeds=None):
    """On the CPU, whose device the judgement of sizes does not read."""
    sets = Ragged.from_counts(counts)
    k = torch.zeros(sum(counts) if rows is None else rows, 1, 8)
    q = k if seeds is None else torch.zeros(seeds, 1, 8)
    return Operands.plain(q, k, k, None if seeds else sets.ptr, sets.ptr), sets


def test_sizes_decide_by_the_longest_set_or_by_the_mean():
    small, sets = operands([64, 3, 0])
    assert sets.sizes.longest == 64 and problems._are_small(small)
    large, sets = operands([65, 1, 0])
    assert problems._are_small(large)  # by the mean: nobody has asked for the sizes yet
    assert sets.sizes.longest == 65 and not problems._are_small(large)
    assert not problems._are_small(operands([100, 100])[0])
    assert not problems._are_small(operands([3, 3], seeds=65)[0])
    assert problems._are_small(operands([3, 3], seeds=64)[0])
    assert not problems._are_small(operands([3], rows=65)[0])  # rows of no molecule count, too
    with torch._subclasses.FakeTensorMode():
        assert not problems._are_small(operands([3, 3])[0])
    sets = Ragged.from_counts([3, 3])  # made outside of a graph that is recorded
    with torch._subclasses.FakeTensorMode():
        k = torch.zeros(6, 1, 8)
    assert not problems._are_small(Operands.plain(k, k, k, sets.ptr, sets.ptr))


@pytest.mark.parametrize("width", [1, 128, 129, 256, 257, 512, 513, 1000])
def test_brackets_of_widths_are_served_as_the_widths_are(width):
    """One graph serves all widths of a bracket, so no backend may end inside of one."""
    least = dispatch._bracket(width)
    assert least >= width or width > 512
    assert least == min((x for x in (128, 256, 512) if x >= width), default=513)
    for name in backends():
        why_not = impl.load(name).why_not
        for given in (FORCES, GPU):
            one = replace(given, head_dim=width, value_dim=width)
            assert bool(why_not(one)) == bool(why_not(replace(one, head_dim=least))), name
