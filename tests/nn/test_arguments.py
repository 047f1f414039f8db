"""Nothing that cannot be is accepted by a constructor, and every error names its argument."""

import pytest
import torch

from attnpool_kernels import nn

NAN, INF = float("nan"), float("inf")
INT = ("1", 0, -1, 1.0, True, NAN, [], (2,), torch.tensor(2))
COUNT = tuple(bad for bad in INT if bad != 0 or isinstance(bad, bool))
BOOL = ("yes", 0, 1, None, NAN, [], torch.tensor(True))
NAME = ("nope", 1, None, True, ["relu"])
NUMBER = ("1", True, NAN, INF, [], 1j, torch.tensor(1.0))
WRONG = {
    "dim": INT,
    "heads": (*INT, 3),
    "query_dim": INT,
    "key_dim": INT,
    "in_dim": INT,
    "points": INT,
    "seeds": INT,
    "in_features": INT,
    "hidden": INT,
    "out_features": INT,
    "channels": INT,
    "encoder_blocks": COUNT,
    "decoder_blocks": COUNT,
    "num_encoder_blocks": COUNT,
    "num_decoder_blocks": COUNT,
    "num_seed_points": INT,
    "out_projection": BOOL,
    "norm": BOOL,
    "pre_linear": BOOL,
    "concat": BOOL,
    "layer_norm": BOOL,
    "scale": (*NUMBER, None),
    "dropout": (*NUMBER, None, -0.1, 1, 2.0),
    "init": NAME,
    "residual": NAME,
    "activation": NAME,
    "reduce": NAME,
    "empty": NAME,
    "variant": NAME,
    "backend": ("nope", 1, True, ["cpu"]),
    "phantom": ("nope", 0, -3, 2.5, True, []),
    "mean": NUMBER,
    "std": (*NUMBER, 0.0, -1.0),
    "widths": ("12", 4, (4,), (), (4, 0), (4, 1.0), None),
    "cutoff": ("5", True, NAN, INF, 0, -1.0, None),
    "pool": (None, "sum", torch.sum),
    "head": ("linear", 1, torch.sum),
    "output_key": (None, 1),
    "input_key": (None, 1),
}
HIDDEN_WIDTHS = (4, "44", (4, 0), (4, True), (1.5,), None)
MAB = {
    "scale": "head",
    "out_projection": False,
    "activation": "relu",
    "norm": False,
    "dropout": 0.0,
    "init": "linear",
    "backend": None,
}
MODEL = {
    "heads": 2,
    "seeds": 2,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "points": None,
    "pre_linear": False,
    "residual": "query",
    **MAB,
}
WIDTHS = {"in_features": 8, "hidden": 8, "out_features": 8}
RIGHT = {
    nn.SetAttention: {
        "dim": 8,
        "heads": 2,
        "query_dim": 8,
        "key_dim": 8,
        "out_projection": True,
        "scale": "head",
        "dropout": 0.1,
        "init": "linear",
        "backend": None,
    },
    nn.MAB: {"dim": 8, "heads": 2, "query_dim": 8, "key_dim": 8, "residual": "query", **MAB},
    nn.SAB: {"dim": 8, "heads": 2, "in_dim": 8, "residual": "query", **MAB},
    nn.ISAB: {"dim": 8, "points": 2, "heads": 2, "in_dim": 8, **MAB},
    nn.PMA: {"dim": 8, "seeds": 2, "heads": 2, "in_dim": 8, "pre_linear": False, **MAB},
    nn.SetTransformer: {**WIDTHS, "reduce": "none", **MODEL},
    nn.AttentionPooling: {**WIDTHS, "reduce": "mean", "phantom": None, **MODEL},
    nn.AttentionPooling.original: {
        "variant": "schnet",
        **WIDTHS,
        "heads": 2,
        "encoder_blocks": 1,
        "phantom": None,
    },
    nn.SeedPooling: {
        "channels": 8,
        "out_features": 8,
        "seeds": 2,
        "heads": 2,
        "reduce": "mean",
        "pre_linear": False,
        **MAB,
    },
    nn.AttentionalPooling: {"channels": 8, "out_features": 8, "hidden": 8, "activation": "relu"},
    nn.WeightedAverage: {
        "channels": 8,
        "out_features": 8,
        "hidden": (4,),
        "mean": 0.0,
        "std": 1.0,
        "activation": "relu",
    },
    nn.Perceptron: {"widths": (8, 4), "activation": "relu"},
}


def check_all(make, right):
    make(**right)
    for name in right:
        wrong = HIDDEN_WIDTHS if make is nn.WeightedAverage and name == "hidden" else WRONG[name]
        for bad in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                make(**(right | {name: bad}))
    with pytest.raises(TypeError, match="unknown_option"):
        make(**right, unknown_option=1)


@pytest.mark.parametrize("make", RIGHT, ids=lambda make: make.__name__)
def test_constructors(make):
    check_all(make, RIGHT[make])


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, ValueError), (-2, ValueError), (2**70, ValueError), (3, ValueError), (True, TypeError)],
)
@pytest.mark.parametrize("make", [nn.SetAttention, nn.MAB, nn.SAB])
def test_equal_molecules_share_all_rows(make, size, error):
    """Rows that an int for ptr leaves over would attend to nothing."""
    layer, x = make(4), torch.randn(8, 4)
    assert torch.equal(layer(x, 4), layer(x, torch.tensor([0, 4, 8])))
    with pytest.raises(error, match="ptr"):
        layer(x, size)


ROWS = torch.randn(5, 4)


@pytest.mark.parametrize(
    "x",
    [ROWS.to_sparse(), ROWS.to_sparse_csr(), ROWS.to_mkldnn(), ROWS.to(torch.float8_e4m3fn)],
    ids=["sparse", "csr", "mkldnn", "float8"],
)
@pytest.mark.parametrize(
    "make",
    [
        nn.MeanPooling,
        nn.MaxPooling,
        nn.SoftmaxPooling,
        nn.StdPooling,
        lambda: nn.AttentionalPooling(4, 2),
        lambda: nn.SAB(4),
        lambda: nn.Set2Set(4, 2),
        lambda: nn.AttentionPooling(4, 4, heads=2, seeds=2),
    ],
)
def test_rows_of_layouts_that_no_layer_serves(make, x):
    with pytest.raises((NotImplementedError, TypeError), match=r"\bx\b"):
        make()(x, torch.tensor([0, 2, 5]))


def test_numbers_beyond_an_index():
    with pytest.raises(ValueError, match="encoder_blocks must be below"):
        nn.SetTransformer(8, 8, encoder_blocks=2**70)


def test_factor_of_the_coefficient_loss():
    pool, x = nn.OrbitalWeightedAverage(4, hidden=(2,)), torch.randn(3, 4)
    for bad in NUMBER:
        with pytest.raises((TypeError, ValueError), match="factor"):
            pool.loss(x, torch.tensor([0, 3]), torch.ones(1, 1), torch.ones(3), factor=bad)
