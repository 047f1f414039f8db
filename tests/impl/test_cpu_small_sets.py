"""Small sets on the CPU: rows of any width and layout are read and written where they lie."""

from dataclasses import replace

import pytest
import torch

from attnpool_kernels import testing
from attnpool_kernels.impl import cpu
from attnpool_kernels.testing import Case

if cpu.load():
    pytest.skip(cpu.load(), allow_module_level=True)

SIZES = (1, 7, 8, 9, 15, 63, 64, 65, 0, 16, 17)  # about whole vectors, and about one block


def judge(case, dtype=torch.float32):
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, cpu))


@pytest.mark.parametrize("dim", range(1, 73))
def test_every_width(width, dim):
    judge(Case("widths", (9, 0, 17, 1), heads=2, dim=dim, value_dim=73 - dim, lse=True))


@pytest.mark.parametrize("dim", [16, 20, 24, 33, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"key_bias": "mask"}, {"bias": "mask"}, {"dropout": 0.3, "key_bias": "pair"}],
    ids=("plain", "key bias", "bias", "dropout"),
)
def test_sizes_about_a_block(width, dim, options):
    judge(Case("sizes", SIZES, heads=2, dim=dim, lse=True, **options))


@pytest.mark.parametrize("dims", [(32, 32), (64, 96), (32, 16), (96, 32)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_bias": "mask"},
        {"bias": "mask", "nobody": 3},
        {"dropout": 0.3, "key_bias": "pair", "bias": "pair"},
        {"logits": 30.0},
        {"layout": "fused"},
        {"layout": "offset"},
        {"q_counts": (3, 1, 64, 65, 7, 30, 9, 33, 0, 20, 20)},
    ],
    ids=str,
)
def test_pairs_of_bfloat16(width, dims, options):
    """Where the processor multiplies pairs of them; elsewhere as any half type."""
    judge(
        Case("pairs", SIZES, heads=2, dim=dims[0], value_dim=dims[1], lse=True, **options),
        torch.bfloat16,
    )


@pytest.mark.parametrize("counts", [(64, 65, 3, 128), (129, 1, 130, 64)], ids=str)
def test_sizes_of_queries_and_keys_that_differ(width, counts):
    judge(Case("cross", counts, q_counts=(65, 64, 130, 1), heads=2, dim=24, lse=True))


@pytest.mark.parametrize("logits", [30.0, 300.0])
def test_large_logits(width, logits):
    judge(Case("logits", (64, 15, 9), heads=2, dim=20, logits=logits, lse=True))


@pytest.mark.parametrize("layout", ["fused", "transposed", "expanded", "offset"])
@pytest.mark.parametrize("dim", [8, 20, 32])
def test_bits_do_not_depend_on_the_layout(width, layout, dim):
    """Rows that cannot be read where they lie are copied, and summed in the same order."""
    batch = Case("layout", (40, 9, 64), heads=4, dim=dim, layout=layout).make(torch.float32)
    dense = replace(
        batch, **{name: getattr(batch, name).contiguous() for name in ("q", "k", "v", "dout")}
    )
    found, expected = testing.run_kernels(batch, cpu), testing.run_kernels(dense, cpu)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def test_distant_elements_of_a_row(width):
    """Rows whose elements do not follow each other."""
    batch = Case("unit", (17, 9), heads=2, dim=32).make(torch.float32)
    every_third = {
        name: torch.stack([x, -x, x], -1)[..., 0]
        for name in ("q", "k", "v", "dout", "ddq", "ddk", "ddv")
        for x in [getattr(batch, name)]
    }
    assert every_third["k"].stride(-1) == 3
    found = testing.run_kernels(replace(batch, **every_third), cpu)
    for name, x in testing.run_kernels(batch, cpu).items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("dim", [32, 36])
def test_results_too_large_for_the_caches(width, dim):
    """They are written past the caches, where their rows are aligned; that changes no bit."""
    sizes = (40, 64, 1, 15)
    rows = sum(sizes)
    one = Case("few", sizes, heads=8, dim=dim).make(torch.float32)
    copies = 2**22 // (rows * 8 * dim) + 2
    starts = [one.k_ptr[:-1] + i * rows for i in range(copies)]
    ptr = torch.cat([*starts, torch.tensor([copies * rows])])
    names = ("q", "k", "v", "dout", "ddq", "ddk", "ddv")
    many = replace(
        one,
        case=replace(one.case, counts=sizes * copies),
        q_ptr=ptr,
        k_ptr=ptr,
        **{name: getattr(one, name).repeat(copies, 1, 1) for name in names},
    )
    torch.set_num_threads(2)
    found = testing.run_kernels(many, cpu)
    torch.set_num_threads(1)
    for name, x in testing.run_kernels(one, cpu).items():
        assert (found[name].reshape(copies, *x.shape) == x).all(), name
