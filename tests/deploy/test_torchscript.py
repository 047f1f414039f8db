"""Scripted functions and layers: the eager numbers to second order, and after a load."""

import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import attnpool_kernels
from attnpool_kernels import nn, torchscript
from attnpool_kernels.impl import library

pytestmark = [
    pytest.mark.skipif(library.load_cpu() != "", reason="the C++ library is not built"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]
PTR = torch.tensor([0, 3, 3, 9])
WRONG = (RuntimeError, torch.jit.Error)  # from an operator, from the program
ROWS, PAIRS = 11, 9 + 36  # the last two rows belong to no molecule


def random(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def derivatives(out, leaves):
    """First and second ones of a function of the result."""
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    return [*first, *second]


def test_functions_have_the_bits_of_the_eager_ones():
    q, k, v = random(ROWS, 2, 4), random(ROWS, 2, 4), random(ROWS, 2, 3)
    bias, key_bias = random(PAIRS, 1), random(ROWS)
    leaves = (q, k, v, bias, key_bias)
    script = torch.jit.script(torchscript.set_attention)
    found = script(q, k, v, PTR.int(), None, bias, key_bias, 0.3)
    right = attnpool_kernels.set_attention(q, k, v, PTR, bias=bias, key_bias=key_bias, scale=0.3)
    assert torch.equal(found, right)
    assert all(map(torch.equal, derivatives(found, leaves), derivatives(right, leaves)))
    seeds = random(2, 2, 4)
    found = torch.jit.script(torchscript.seed_pool)(seeds, k, v, PTR)
    right = attnpool_kernels.seed_pool(seeds, k, v, PTR)
    assert torch.equal(found, right)
    leaves = (seeds, k, v)
    assert all(map(torch.equal, derivatives(found, leaves), derivatives(right, leaves)))


def test_dropout_draws_what_the_eager_one_draws():
    q = random(ROWS, 2, 4)
    torch.manual_seed(3)
    found = torch.jit.script(torchscript.set_attention)(q, q, q, PTR, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(found, attnpool_kernels.set_attention(q, q, q, PTR, dropout=0.5))


@pytest.mark.parametrize(
    "wrong", ["rows", "boundaries", "dtype", "key_bias", "no dimension", "bias", "scale", "heads"]
)
def test_what_cannot_be_raises(wrong):
    q, k, ptr, key_bias = random(ROWS, 2, 4), random(ROWS, 2, 4), PTR, None
    bias = random(PAIRS + (wrong == "bias"), 1)
    scale = float("nan") if wrong == "scale" else 0.5
    if wrong == "rows":
        k = k[:5]
    elif wrong == "boundaries":
        ptr = torch.tensor([0, 3, 30])
    elif wrong == "dtype":
        k = k.float()
    elif wrong == "key_bias":
        key_bias = random(ROWS - 1)
    elif wrong == "no dimension":
        key_bias = torch.zeros((), dtype=torch.float64)
    elif wrong == "heads":
        k = k[:, :1]
    with pytest.raises(WRONG):
        torch.jit.script(torchscript.set_attention)(q, k, k, ptr, None, bias, key_bias, scale)


def aggregation(name, *arguments, **options):
    zoo = pytest.importorskip("attnpool_kernels.zoo.pyg", exc_type=ImportError)
    return getattr(zoo, name)(*arguments, **options)


NORM = nn.PYG | {"norm": True}
LAYERS = {
    "attention": lambda: nn.SetAttention(8, 2),
    "other scale": lambda: nn.SetAttention(8, 2, scale=0.7, out_projection=False),
    "ABP": lambda: nn.AttentionPooling(8, 8, heads=2, seeds=3, encoder_blocks=1),
    "ISAB": lambda: nn.AttentionPooling(8, 8, heads=2, seeds=1, encoder_blocks=1, points=2),
    "PyG": lambda: nn.SetTransformer(8, 8, 4, heads=2, seeds=3, encoder_blocks=1, **NORM),
    "paper": lambda: nn.SetTransformer(8, 8, heads=2, reduce="concat", **nn.PAPER),
    "seeds": lambda: nn.SeedPooling(8, 6, heads=2, activation="gelu"),
    "aggregation": lambda: aggregation("SetTransformerAggregation", 8, 2, heads=2, empty="zero"),
    "GMT": lambda: aggregation("GraphMultisetTransformer", 8, 2, heads=2),
    "any pooling": lambda: aggregation("AttentionPoolingAggregation", 8, 8, heads=2, seeds=2),
}
BY_INDEX = ("aggregation", "GMT", "any pooling")


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, rest = LAYERS[name]().double(), (None, PTR) if name in BY_INDEX else (PTR,)
    eager = layer(x := random(9, 8), *rest)
    script = torch.jit.script(layer)
    assert script.state_dict().keys() == layer.state_dict().keys()
    leaves = [x, *layer.parameters()]
    for a, b in zip(derivatives(script(x, *rest), leaves), derivatives(eager, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    # Scripting leaves the layer as it was.
    assert torch.equal(layer(x, *rest), eager)
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied(x, *rest), eager)
    assert torch.jit.script(copied)(x, *rest).shape == eager.shape


def test_index_in_any_order_as_the_eager_aggregation():
    zoo = pytest.importorskip("attnpool_kernels.zoo.pyg", exc_type=ImportError)
    layer = zoo.SetTransformerAggregation(8, 2, heads=2).double()
    script, x = torch.jit.script(layer), random(6, 8)
    index = torch.tensor([2, 0, 2, 0, 0, 3])
    torch.testing.assert_close(script(x, index), layer(x, index))
    torch.testing.assert_close(script(x, index, None, 5), layer(x, index, dim_size=5))
    for wrong in (index - 1, index[:4]):
        with pytest.raises(WRONG, match="index must"):
            script(x, wrong)
    with pytest.raises(WRONG, match="index must be from 0"):
        script(x, index, None, 2)
    with pytest.raises(WRONG, match="number of rows"):
        script(x, None, torch.tensor([0, 3]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_as_torch_has_it(first, weights):
    own = torch.nn.MultiheadAttention(8, 2, batch_first=first, dtype=torch.float64)
    layer = nn.MultiheadAttention(8, 2, batch_first=first, dtype=torch.float64)
    layer.load_state_dict(own.state_dict())
    script, x = torch.jit.script(layer), random(4, 5, 8)
    mask = torch.zeros((4, 5) if first else (5, 4), dtype=torch.bool)
    mask[1, 2:] = True
    found, right = script(x, x, x, mask, weights), own(x, x, x, mask, need_weights=weights)
    torch.testing.assert_close(found[0], right[0])
    if weights:
        torch.testing.assert_close(found[1], right[1])
    packed = script(rows := random(ROWS, 8), rows, rows, ptr=PTR)[0]
    torch.testing.assert_close(packed, layer(rows, rows, rows, ptr=PTR)[0])
    with pytest.raises(WRONG, match="without masks"):
        script(rows, rows, rows, mask, ptr=PTR)


def test_multihead_attention_refuses_what_the_eager_one_refuses():
    script, x = (
        torch.jit.script(nn.MultiheadAttention(8, 2, batch_first=True)),
        torch.randn(4, 5, 8),
    )
    with pytest.raises(WRONG, match="ptr must be given"):
        script(x, x, x, need_weights=False, key_bias=torch.randn(20))
    with pytest.raises(WRONG, match="ptr must be given"):
        script(x, x, x, need_weights=False, key_ptr=PTR)
    with pytest.raises(WRONG, match="batch size of query"):
        script(x[:2], x, x, need_weights=False)
    with pytest.raises(WRONG, match="rows of key"):
        script(rows := torch.randn(ROWS, 8), rows, rows[:10], ptr=PTR)


def test_inside_of_torchs_encoder_layer():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    nn.MultiheadAttention.from_torch(layer.self_attn)
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


class Twice(nn.PMA):
    def _rows(self, x):
        return 2 * super()._rows(x)


def half_of(layer):
    own = layer.forward
    layer.forward = lambda *given: 0.5 * own(*given)
    return layer


def halved_aggregation():
    zoo = pytest.importorskip("attnpool_kernels.zoo.pyg", exc_type=ImportError)

    class Halved(zoo.SetTransformerAggregation):
        def pooled(self, x, ragged):
            return 0.5 * super().pooled(x, ragged)

    return Halved(8, 2, heads=2)


@pytest.mark.parametrize(
    "make", [lambda: Twice(8), lambda: half_of(nn.SeedPooling(8, 6)), halved_aggregation]
)
def test_what_computes_something_else_is_not_replaced(make):
    """TorchScript refuses it; and what it does in Python stays."""
    layer = make().double()
    given = (random(9, 8), PTR) if not hasattr(layer, "encoders") else (random(9, 8), None, PTR)
    before = layer(*given)
    with pytest.raises(Exception):  # noqa: B017  torch's own, of several kinds
        torch.jit.script(layer)
    assert torch.equal(layer(*given), before)


class Doubled(nn.SetAttention):
    def forward(self, x: Tensor, ptr: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x


def test_a_subclass_is_compiled_as_it_is():
    x = random(9, 8)
    assert torch.equal(torch.jit.script(Doubled(8))(x, PTR), 2 * x)


def test_phantom_rows_are_refused():
    with pytest.raises(NotImplementedError, match="phantom must be None"):
        torch.jit.script(nn.AttentionPooling(8, 8, heads=2, phantom=9))


LOADED = """
import sys, torch
if len(sys.argv) > 3: import attnpool_kernels
model, (x, ptr, right) = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
x.requires_grad_()
assert torch.equal(torch.autograd.grad(model(x, ptr).sum(), x)[0], right)
"""


def test_a_saved_model_in_a_fresh_process(tmp_path):
    """With the package the forces are there; without it the load fails, and no force is wrong."""
    layer, x = nn.AttentionPooling(8, 8, heads=2, seeds=3, encoder_blocks=1).double(), random(9, 8)
    script = torch.jit.script(layer)
    script.save(tmp_path / "model.pt")
    stream = io.BytesIO()
    torch.jit.save(script, stream)
    (right,) = torch.autograd.grad(script(x, PTR).sum(), x)
    torch.save((x.detach(), PTR, right), tmp_path / "data")
    command = [sys.executable, "-c", LOADED, tmp_path / "model.pt", tmp_path / "data"]
    subprocess.run([*command, "with the package"], check=True)
    alone = subprocess.run(command, capture_output=True, text=True)
    assert alone.returncode != 0 and "attnpool_autograd" in alone.stderr
