"""Wrong arguments of functions and modules give the documented error types and no other."""

import functools
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tools.drawn import drawn

from attnpool_kernels import (
    BackendError,
    Ragged,
    attention_weights,
    compat,
    nn,
    ragged,
    seed_pool,
    set_attention,
)

pytest.importorskip("torch_geometric")

from attnpool_kernels.zoo import pyg
from fuzz.test_modules_fuzz import MODULES, C

# BackendError is the only RuntimeError of arguments.
DOCUMENTED = (TypeError, ValueError, NotImplementedError, BackendError)
PTR = torch.tensor([0, 3, 3, 8])
INDEX = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
FORMS = {
    "plain": lambda x: x,
    "none": lambda x: None,
    "list": lambda x: x.tolist() if isinstance(x, torch.Tensor) else [x],
    "numpy": lambda x: np.asarray(x),
    "text": lambda x: "x",
    "number": lambda x: 3,
    "negative": lambda x: -1,
    "real": lambda x: 1.5,
    "nan": lambda x: math.nan,
    "bool": lambda x: True,
    "large": lambda x: 2**70,
    "tuple": lambda x: (1, 2),
    "dict": lambda x: {"a": 1},
    "device": lambda x: torch.device("cpu"),
    "ragged": lambda x: Ragged(PTR),
    "int": lambda x: x.int(),
    "long": lambda x: x.long(),
    "int16": lambda x: x.to(torch.int16),
    "boolean": lambda x: x.bool(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.reshape(len(x), -1).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x[:1], x], layout=torch.jagged),
    "meta": lambda x: x.to("meta"),
    "scalar": lambda x: x.reshape(-1)[0],
    "flat": lambda x: x.reshape(-1),
    "empty": lambda x: x[:0],
    "shorter": lambda x: x[:-1],
    "longer": lambda x: torch.cat([x, x[-1:]]),
    "wider": lambda x: torch.cat([x, x[..., -1:]], -1),
    "narrow": lambda x: x[..., :-1],
    "dimension": lambda x: x[None],
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "flipped": lambda x: x.flip(0),
    "less": lambda x: x - 1,
    "more": lambda x: x + 1,
    "far": lambda x: x + 2**40 if not x.is_floating_point() else x * math.inf,
    "grad": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x),
    "subclass": lambda x: x.as_subclass(Own),
    "conjugate": lambda x: torch.view_as_real(torch.complex(x, x).conj())[..., 1],
}


SAME = ("strided", "grad", "parameter")


class Own(torch.Tensor):
    """A subclass that does nothing."""


def operation(q, k, v, ptr, k_ptr, bias, key_bias, scale, dropout, backend, return_lse):
    return set_attention(
        q,
        k,
        v,
        ptr,
        k_ptr,
        bias=bias,
        key_bias=key_bias,
        scale=scale,
        dropout=dropout,
        backend=backend,
        return_lse=return_lse,
    )


def pool(seeds, k, v, ptr, bias, scale, dropout, backend):
    return seed_pool(seeds, k, v, ptr, bias=bias, scale=scale, dropout=dropout, backend=backend)


X = torch.linspace(-1, 1, 8 * 2 * 4).reshape(8, 2, 4)
ROWS = torch.linspace(-1, 1, 8 * C).reshape(8, C)
CALLS = {
    "set_attention": (
        operation,
        {
            **dict.fromkeys(("q", "k", "v"), X),
            "ptr": PTR,
            "k_ptr": None,
            "bias": torch.zeros(34, 2),
            "key_bias": torch.zeros(8, 2),
            "scale": 0.5,
            "dropout": 0.0,
            "backend": None,
            "return_lse": False,
        },
    ),
    "seed_pool": (
        pool,
        {
            "seeds": X[:2],
            "k": X,
            "v": X,
            "ptr": PTR,
            "bias": None,
            "scale": None,
            "dropout": 0.1,
            "backend": "cpu",
        },
    ),
    "weights": (attention_weights, {"q": X, "k": X, "ptr": PTR}),
    "Ragged": (Ragged, {"ptr": PTR}),
    "from_batch": (Ragged.from_batch, {"batch": INDEX, "num_molecules": 3}),
    "from_counts": (Ragged.from_counts, {"counts": PTR.diff()}),
    "from_mask": (Ragged.from_mask, {"mask": torch.ones(3, 4, dtype=torch.bool)}),
    "check": (ragged.check, {"ptr": PTR, "rows": 8}),
    "flash": (
        compat.flash_attn_varlen_func,
        {
            **dict.fromkeys(("q", "k", "v"), X),
            "cu_seqlens_q": PTR.int(),
            "cu_seqlens_k": PTR.int(),
            "max_seqlen_q": 5,
            "max_seqlen_k": 5,
        },
    ),
    "aggregation": (
        pyg.SetTransformerAggregation(C, 2, heads=2),
        {
            "x": ROWS,
            "index": INDEX,
            "ptr": None,
            "dim_size": 3,
            "dim": -2,
            "max_num_elements": 5,
        },
    ),
    "aggregation by ptr": (
        pyg.GraphMultisetTransformer(C, 2, heads=2),
        {"x": ROWS, "index": None, "ptr": PTR, "dim_size": None},
    ),
    "set2set": (pyg.Set2Set(C, 2), {"x": ROWS, "index": INDEX, "dim_size": None}),
    "graph": (pyg.MoleculeGraph(2.0), {"pos": ROWS[:, :3], "batch": INDEX}),
}
for _name, _make in MODULES.items():
    if _name not in ("drop-in", "multiset", "drop-in set2set"):
        CALLS[_name] = (_make().eval(), {"x": ROWS, "ptr": PTR})

changes = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(sorted(FORMS))), min_size=1, max_size=2
)


@drawn(150, name=st.sampled_from(sorted(CALLS)), steps=changes)
def test_wrong_arguments(name, steps):
    """The documented types; the same result where the values are the same."""
    call, right = CALLS[name]
    given, forms, same = dict(right), [], True
    for number, form in steps:
        field = list(right)[number % len(right)]
        try:
            given[field] = FORMS[form](given[field])
        except Exception:  # there is no such value
            continue
        forms.append(form)
        tensor = isinstance(right[field], torch.Tensor)
        same &= form == "plain" or (form in SAME and tensor and given[field] is not None)
        if form in ("grad", "parameter"):
            same &= tensor and right[field].is_floating_point()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = call(**given)
        except DOCUMENTED as error:
            said = str(error)
            assert said and "object has no attribute" not in said, said
            assert not same, said
            return
        except RuntimeError as error:
            if "meta" in forms or "can't allocate memory" in str(error):
                return  # of torch, and of no argument's kind or value
            raise
    if same and isinstance(found, torch.Tensor) and name not in ("seed_pool", "drop-in"):
        assert torch.equal(found, call(**right))


JUNK = [None, -1, 0, 1.5, "x", True, math.nan, [], (1,), {}, 2**70, torch.tensor(2), np.int64(2)]
CONSTRUCTORS = {
    **{name: getattr(nn, name) for name in nn.__all__ if inspect.isclass(getattr(nn, name))},
    "MultiheadAttention": nn.SAB,  # whose constructor is torch's own
    "drop-in": pyg.SetTransformerAggregation,
    "multiset": pyg.GraphMultisetTransformer,
    "pooling": pyg.PoolingAggregation,
    "graph": pyg.MoleculeGraph,
}
SIZES = {"heads": 2, "layers": "SPS", "widths": (8, 4), "pools": None, "pool": None}


@functools.cache
def parameters(name):
    found = inspect.signature(CONSTRUCTORS[name]).parameters.values()
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@drawn(
    100,
    name=st.sampled_from(sorted(CONSTRUCTORS)),
    wrong=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, len(JUNK) - 1)), min_size=1, max_size=2
    ),
)
def test_wrong_options_of_constructors(name, wrong):
    options = {}
    for p in parameters(name):
        if p.default is p.empty:
            options[p.name] = SIZES.get(p.name, 8)
    for number, value in wrong:
        if parameters(name):
            options[parameters(name)[number % len(parameters(name))].name] = JUNK[value]
    try:
        CONSTRUCTORS[name](**options)
    except (TypeError, ValueError) as error:
        said = str(error)
        assert "object" not in said or "object has no" not in said, said
