"""Few queries on the CPU: lanes are keys, and many keys are cut into parts for all threads."""

from dataclasses import replace

import pytest
import torch

from attnpool_kernels import set_attention, testing
from attnpool_kernels.impl import cpu
from attnpool_kernels.testing import Case

if cpu.load():
    pytest.skip(cpu.load(), allow_module_level=True)

OPTIONS = {
    "plain": {},
    "key bias": {"key_bias": "mask"},
    "bias": {"bias": "mask"},
    "dropout": {"dropout": 0.3, "key_bias": "pair", "bias": "pair"},
    "large logits": {"logits": 30.0},
}
# Parts are of 16 blocks of 128 keys at these widths, and begin with two of them.
GIANT = Case("giant", (4096, 17, 0, 6001), heads=2, dim=16, value_dim=24, lse=True, nobody=3)


def run(batch):
    return testing.run_kernels(batch, cpu)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seeds", [1, 2, 5, 8, 9])
def test_every_option(width, seeds, options):
    counts = (3, 15, 16, 17, 0, 47, 48, 127, 128, 129, 300)
    case = Case("few", counts, heads=2, dim=20, seeds=seeds, lse=True, **options)
    testing.judge(case, torch.float32, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_queries_of_their_own(width, options, dtype):
    case = Case("few", (40, 130, 7, 64, 500), heads=2, dim=16, lse=True, **options)
    testing.judge(replace(case, q_counts=(1, 3, 2, 0, 4)), dtype, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seeds", [1, 20, 64])
def test_giants(seeds, options, dtype):
    testing.judge(replace(GIANT, seeds=seeds, **options), dtype, run)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_giants_with_queries_of_their_own(options):
    testing.judge(replace(GIANT, q_counts=(3, 5, 0, 40), **options), torch.float32, run)


def test_wide_giants():
    """Blocks of 32 keys, so that parts are of 512."""
    case = replace(GIANT, counts=(1100, 5), heads=1, dim=272, value_dim=300, seeds=2)
    testing.judge(case, torch.float32, run)


@pytest.mark.parametrize("queries", [1, 8, 40])
def test_bits_of_a_giant(queries):
    """The same alone and in a batch, and by any number of threads, in all three passes."""
    q_counts, counts = (20, queries, 1), (9, 5000, 4200)
    q = torch.randn(sum(q_counts), 2, 16)
    k, v = (torch.randn(sum(counts), 2, 16) for _ in "kv")
    own = slice(20, 20 + queries), slice(9, 5009)

    def results(rows, keys, q_ptr, k_ptr, threads):
        x = [t.requires_grad_() for t in (q[rows].clone(), k[keys].clone(), v[keys].clone())]
        torch.set_num_threads(threads)
        out = set_attention(*x, torch.tensor(q_ptr), torch.tensor(k_ptr), backend="cpu")
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        return [t.detach() for t in (out, *first, *second)]

    before = torch.get_num_threads()
    try:
        alone = results(*own, [0, queries], [0, 5000], 1)
        threads = results(*own, [0, queries], [0, 5000], 2)
        ends = [20, 20 + queries, 21 + queries], [9, 5009, 9209]
        among = results(slice(None), slice(None), [0, *ends[0]], [0, *ends[1]], 2)
    finally:
        torch.set_num_threads(before)
    for i, (one, two, three) in enumerate(zip(alone, threads, among)):
        assert torch.equal(one, two), i
        assert torch.equal(one, three[own[0 if len(one) == queries else 1]]), i
