"""A graph recorded from one batch serves batches of other sizes: no size is a number in it."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attnpool_kernels import Ragged, layouts, nn, seed_pool, set_attention

WIDTH = 8
RECORDED, OTHERS = [3, 4, 2], ([5, 1], [2, 0, 7, 4, 3], [12])


def rows(x):
    return x.unflatten(1, (2, -1))


def attention(x, ptr):
    key_bias = x[:, 0].cos()
    return set_attention(rows(x), rows(x), rows(x), Ragged(ptr), key_bias=key_bias).flatten(1)


def seeds(x, ptr):
    return seed_pool(rows(torch.eye(WIDTH, dtype=x.dtype))[:3], rows(x), rows(x), ptr).flatten(1)


def padded_and_back(x, ptr):
    sets = Ragged(ptr)
    return layouts.pack(layouts.unpack(x, sets, 16), sets, x.shape[0])


def with_centres(x, ptr):
    sets = Ragged(ptr)
    centres = x.new_ones(sets.molecules, WIDTH)
    return layouts.with_centres(centres, x, sets)[0]


POOLS = {
    "sum": nn.SumPooling(),
    "mean": nn.MeanPooling(),
    "max": nn.MaxPooling(),
    "softmax": nn.SoftmaxPooling(),
    "attentional": nn.AttentionalPooling(WIDTH, 4),
    "weighted": nn.WeightedAverage(WIDTH),
    "var": nn.VarPooling(),
    "std": nn.StdPooling(),
    "multi": nn.Multi([nn.MeanPooling(), nn.MaxPooling()]),
    "set2set": nn.Set2Set(WIDTH, 2),
    "seed": nn.SeedPooling(WIDTH, heads=2, seeds=2),
    "ABP": nn.AttentionPooling(WIDTH, 8, heads=2, seeds=2, encoder_blocks=1),
    "induced points": nn.AttentionPooling(WIDTH, 8, heads=2, seeds=2, encoder_blocks=1, points=3),
    "set transformer": nn.SetTransformer(WIDTH, 8, 4, heads=2, seeds=1, **nn.PYG),
}
PROGRAMS = {
    "attention": attention,
    "seeds": seeds,
    "padded": padded_and_back,
    "centres": with_centres,
    **{name: pool.double() for name, pool in POOLS.items()},
}


def batch(sizes):
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    x = torch.randn(sum(sizes), WIDTH, generator=generator, dtype=torch.float64)
    return x, Ragged.from_counts(sizes).ptr


def with_gradient(program):
    def run(x, ptr):
        x = x.detach().requires_grad_()
        out = program(x, ptr)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_recorded_with_its_gradient(name):
    program = with_gradient(PROGRAMS[name])
    recorded = make_fx(program, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        *batch(RECORDED)
    )
    for sizes in OTHERS:
        for found, right in zip(recorded(*batch(sizes)), program(*batch(sizes))):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
