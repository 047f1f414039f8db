"""ABP: the original programs' numbers and weights on request, and none of their leak by default."""

import math

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling
from attnpool_kernels.nn.abp import VARIANTS, with_phantoms

PREFIXES = {"schnet": "net.st.", "dimenet++": "st.", "oe62": "output_modules.0.atom_pool."}
COUNTS = (4, 9, 1, 7)


def original_state(c=6, d=8, seeds=32, blocks=2, prefix="", dtype=torch.float64):
    """A state dict with the names and shapes of the original programs."""
    state = {}

    def linear(name, inputs, outputs):
        state[f"{prefix}{name}.weight"] = torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5
        state[f"{prefix}{name}.bias"] = 0.1 * torch.randn(outputs, dtype=dtype)

    names = [(f"enc.{i}", c if i == 0 else d) for i in range(blocks)] + [("dec.0", d), ("dec.1", d)]
    for name, width in names:
        for part in "qkv":
            linear(f"{name}.mab.fc_{part}", width, d)
        linear(f"{name}.mab.fc_o", d, d)
    state[f"{prefix}dec.0.S"] = torch.randn(1, seeds, d, dtype=dtype)
    linear("dec.2", d, c)
    return state


def original(state, padded, heads, activation):
    """The original model on a padded batch [B, n_max, C]: zero rows are keys like all others."""

    def linear(name, x):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def mab(name, x, y):
        q, k, v = (linear(f"{name}.mab.fc_{p}", z) for p, z in zip("qkv", (x, y, y)))
        d = q.shape[-1]
        q, k, v = (z.unflatten(-1, (heads, d // heads)).transpose(1, 2) for z in (q, k, v))
        out = q + (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(-2)
        h = linear(f"{name}.mab.fc_o", out)
        return out + (h.relu() if activation == "relu" else h * h.sigmoid())

    x = padded
    for i in range(sum(name.endswith("fc_q.weight") for name in state if "enc" in name)):
        x = mab(f"enc.{i}", x, x)
    x = mab("dec.0", state["dec.0.S"].expand(len(x), -1, -1), x)
    return linear("dec.2", mab("dec.1", x, x)).mean(1)


def pad(x, counts, size):
    rows = [torch.nn.functional.pad(part, (0, 0, 0, size - len(part))) for part in x.split(counts)]
    return torch.stack(rows)


def model_of(variant, state, heads=2, **options):
    blocks = sum(key.endswith("fc_q.weight") and "enc." in key for key in state)
    model = AttentionPooling.original(
        variant, 6, 8, heads=heads, encoder_blocks=blocks, **options
    ).double()
    model.load_original(state)
    return model


def second_order(out, x, weights, cotangent):
    (force,) = torch.autograd.grad(out, x, cotangent, create_graph=True)
    return force, torch.autograd.grad(force.square().sum(), weights)


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("size", [9, 23, "batch_max"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_phantom_rows_are_the_padding_of_the_original(variant, size, blocks):
    seeds, activation = VARIANTS[variant]
    state = original_state(seeds=seeds, blocks=blocks)
    model = model_of(variant, state, phantom=size)
    x = torch.randn(sum(COUNTS), 6, dtype=torch.float64, requires_grad=True)
    state = {name: value.requires_grad_() for name, value in state.items()}
    full = pad(x, COUNTS, max(COUNTS) if size == "batch_max" else size)
    wanted = original(state, full, 2, activation)
    found = model(x, Ragged.from_counts(COUNTS))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    # A gradient, and a second one, of inputs and of weights that the padded rows use too.
    cotangent = torch.randn_like(wanted)
    ours, theirs = model.head.weight, state["dec.2.weight"]
    lin, fc_o = model.encoders[0].mab.lin.weight, state["enc.0.mab.fc_o.weight"]
    for (a, twice_a), (b, twice_b) in [
        (
            second_order(found, x, (ours, lin), cotangent),
            second_order(wanted, x, (theirs, fc_o), cotangent),
        )
    ]:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        for u, v in zip(twice_a, twice_b):
            torch.testing.assert_close(u, v, rtol=1e-10, atol=1e-11)


def test_without_padding_phantom_and_default_are_the_original():
    state = original_state(seeds=32)
    x = torch.randn(2 * 5, 6, dtype=torch.float64)
    wanted = original(state, x.view(2, 5, 6), 2, "relu")
    for phantom in (None, 5, "batch_max"):
        out = model_of("schnet", state, phantom=phantom)(x, Ragged.from_counts([5, 5]))
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_the_default_does_not_depend_on_batch_mates_and_the_leak_does():
    state = original_state(seeds=32)
    x = torch.randn(30, 6, dtype=torch.float64)
    small = Ragged.from_counts([5])

    def change(**options):
        model = model_of("oe62", state, **options)
        alone = model(x[:5], small)[0]
        beside = model(x, Ragged.from_counts([5, 25]))[0]
        return ((beside - alone).norm() / alone.norm()).item()

    assert change() < 1e-14
    assert change(phantom="batch_max") > 0.01
    leaky, right = model_of("schnet", state, phantom=40), model_of("schnet", state)
    difference = leaky(x[:5], small) - right(x[:5], small)
    assert difference.norm() > 0.05 * right(x[:5], small).norm()


def test_phantoms_are_where_the_rows_are():
    sets = Ragged.from_counts([2, 0, 3]).to("meta")
    rows, longer = with_phantoms(torch.zeros(5, 6, device="meta"), sets)
    assert rows.shape == (8, 6) and longer.ptr.device == rows.device == torch.device("meta")


def test_phantom_of_empty_molecules_is_all_padding():
    state = original_state(seeds=32)
    x = torch.randn(3, 6, dtype=torch.float64)
    out = model_of("schnet", state, phantom=4)(x, Ragged.from_counts([0, 3, 0]))
    wanted = original(state, pad(x, (0, 3, 0), 4), 2, "relu")
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    assert model_of("schnet", state, phantom="batch_max")(x[:0], Ragged.from_counts([])).shape == (
        0,
        6,
    )


def test_phantom_in_half_precision():
    """log m is kept in float32: the error is that of the type, not that of a rounded log m."""
    state = original_state(seeds=32)
    model = model_of("schnet", state, phantom=228)
    x = torch.randn(sum(COUNTS), 6, dtype=torch.float64)
    ragged = Ragged.from_counts(COUNTS)
    wanted = model(x, ragged)
    out = model.bfloat16()(x.bfloat16(), ragged).double()
    assert (out - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_of_the_programs(variant):
    state = original_state(seeds=VARIANTS[variant][0], prefix=PREFIXES[variant])
    whole = {"net.embedding.weight": torch.zeros(2, 3), "regr_nn.0.bias": torch.zeros(3), **state}
    model = AttentionPooling.original(variant, 6, 8, heads=2).double()
    model.load_original(whole)
    stripped = {key.removeprefix(PREFIXES[variant]): value for key, value in state.items()}
    again = model_of(variant, stripped)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_parameter_counts_of_the_paper():
    for c, d, variant, wanted in (
        (256, 1024, "schnet", 14_729_472),
        (128, 512, "schnet", 3_694_720),
        (256, 256, "schnet", 1_126_656),
        (128, 1024, "oe62", 14_205_056),
        (50, 1024, "dimenet++", 13_853_746),
    ):
        with torch.device("meta"):
            model = AttentionPooling.original(variant, c, d)
        assert sum(p.numel() for p in model.parameters()) == wanted


def test_what_is_not_a_checkpoint():
    model = AttentionPooling.original("schnet", 6, 8, heads=2)
    with pytest.raises(KeyError, match="state"):
        model.load_original({"fc.weight": torch.zeros(3)})
    state = original_state(seeds=32)
    with pytest.raises(KeyError, match="ln0"):
        model.load_original({**state, "enc.0.mab.ln0.weight": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="pma"):
        model.load_original(original_state(seeds=1))


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: AttentionPooling(6, 8, heads=3), ValueError, "heads"),
        (lambda: AttentionPooling(6, 8, heads=2, reduce="none"), ValueError, "reduce"),
        (lambda: AttentionPooling(6, 8, heads=2, phantom=0), ValueError, "phantom"),
        (lambda: AttentionPooling(6, 8, heads=2, phantom="max"), ValueError, "phantom"),
        (lambda: AttentionPooling(6, 8, heads=2, phantom=1.5), TypeError, "phantom"),
        (lambda: AttentionPooling(6, 8, heads=2, phantom=3, points=2), ValueError, "phantom"),
        (lambda: AttentionPooling(6, 8, heads=2, layers=3), TypeError, "layers"),
        (lambda: AttentionPooling.original("painn", 6, 8), ValueError, "variant"),
        (
            lambda: AttentionPooling(6, 8, heads=2, phantom=3)(
                torch.randn(5, 6), torch.tensor([0, 1, 5])
            ),
            ValueError,
            "phantom",
        ),
        (
            lambda: AttentionPooling(6, 8, heads=2)(torch.randn(5, 7), torch.tensor([0, 5])),
            ValueError,
            "x",
        ),
        (
            lambda: AttentionPooling(6, 8, heads=2)(torch.randn(5, 6), torch.tensor([0, 6])),
            ValueError,
            "ptr",
        ),
    ],
)
def test_bad_input(call, error, names):
    with pytest.raises(error, match=rf"\b{names}\b"):
        call()
