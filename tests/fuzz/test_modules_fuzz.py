"""Modules in any sequence of what is done to modules give what a fresh one gives."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import strategies as st
from tools.drawn import drawn

from attnpool_kernels import Ragged, nn

pytest.importorskip("torch_geometric")

import torch_geometric.nn.aggr

from attnpool_kernels.zoo import pyg

C = 8
MODULES = {
    "attention": lambda: nn.SetAttention(C, 2, dropout=0.2),
    "attention of other widths": lambda: nn.SetAttention(C, 2, query_dim=C, key_dim=C, scale=0.5),
    "mab": lambda: nn.MAB(C, 2, norm=True, activation="gelu"),
    "sab": lambda: nn.SAB(C, 2, in_dim=C, dropout=0.1),
    "isab": lambda: nn.ISAB(C, 3, 2),
    "pma": lambda: nn.PMA(C, 3, 2, pre_linear=True),
    "transformer": lambda: nn.SetTransformer(C, C, 4, heads=2, seeds=2, reduce="mean"),
    "abp": lambda: nn.AttentionPooling(C, C, heads=2, seeds=3, activation="silu"),
    "phantoms": lambda: nn.AttentionPooling(C, C, heads=2, seeds=3, phantom=12),
    "paper": lambda: nn.AttentionPooling(C, C, heads=2, seeds=3, **nn.PAPER),
    "induced": lambda: nn.AttentionPooling(C, C, heads=2, seeds=2, points=2),
    "seeds": lambda: nn.SeedPooling(C, C, heads=2, seeds=2),
    "gated": lambda: nn.AttentionalPooling(C, 5, hidden=4),
    "weighted": lambda: nn.WeightedAverage(C, 2, hidden=(4,)),
    "softmax": nn.SoftmaxPooling,
    "mean": nn.MeanPooling,
    "max": nn.MaxPooling,
    "sum": nn.SumPooling,
    "set2set": lambda: nn.Set2Set(C, 2),
    "std": nn.StdPooling,
    "drop-in": lambda: pyg.SetTransformerAggregation(C, 2, heads=2, layer_norm=True, dropout=0.1),
    "multiset": lambda: pyg.GraphMultisetTransformer(C, 3, heads=2),
    "drop-in set2set": lambda: pyg.Set2Set(C, 2),
}
SMOOTH = ("attention", "attention of other widths", "sab", "abp", "seeds", "set2set", "weighted")
COUNTS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), min_size=1, max_size=4)
STEPS = (
    "forward",
    "forward",
    "backward",
    "backward",
    "double backward",
    "no_grad",
    "inference",
    "autocast",
    "deepcopy",
    "pickle",
    "saved",
    "float64",
    "float32",
    "bfloat16",
    "train",
    "eval",
    "step",
    "frozen",
    "thawed",
    "new parameter",
    "wrong call",
    "threads",
    "same batch",
    "functional",
    "meta",
)
sequences = st.lists(
    st.tuples(st.sampled_from(STEPS), COUNTS, st.integers(0, 999)), min_size=2, max_size=12
)


class Runner:
    """A module, the constructor of fresh ones, and what has been done."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.make, self.module = MODULES[name], MODULES[name]()
        self.smooth, self.dtype = name in SMOOTH, torch.float32
        self.batch = None

    def fresh(self):
        """A new module with the same parameters, mode and flags."""
        other = self.make().to(self.dtype).train(self.module.training)
        other.load_state_dict({k: x.clone() for k, x in self.module.state_dict().items()})
        for mine, theirs in zip(self.module.parameters(), other.parameters()):
            theirs.requires_grad_(mine.requires_grad)
        return other

    def drawn_batch(self, counts, number):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(sum(counts), C, generator=generator).to(self.dtype)
        self.batch = (x, Ragged.from_counts(counts).ptr)

    def call(self, module, x, ptr, number=0):
        torch.manual_seed(number)
        if isinstance(module, torch_geometric.nn.aggr.Aggregation):
            return module(x, ptr=ptr)
        return module(x, ptr)

    def results(self, module, order, number):
        """Output and all gradients up to an order, by name."""
        x = self.batch[0].clone().requires_grad_(order > 0)
        found = {"out": self.call(module, x, self.batch[1], number)}
        if order == 0 or not found["out"].requires_grad:
            return found
        inputs = {"x": x} | {n: p for n, p in module.named_parameters() if p.requires_grad}
        options = {"allow_unused": True, "create_graph": order > 1}
        first = torch.autograd.grad(found["out"].square().sum(), list(inputs.values()), **options)
        found |= {f"d{n}": g for n, g in zip(inputs, first) if g is not None}
        if order > 1 and first[0] is not None and first[0].requires_grad:
            second = torch.autograd.grad(
                first[0].square().sum(), list(inputs.values()), allow_unused=True
            )
            found |= {f"g{n}": g for n, g in zip(inputs, second) if g is not None}
        return found

    def compare(self, order, number, what):
        found, wanted = (self.results(m, order, number) for m in (self.module, self.fresh()))
        assert found.keys() == wanted.keys(), what
        for name, x in wanted.items():
            assert found[name].dtype == x.dtype, (what, name)
            assert torch.equal(found[name].nan_to_num(), x.nan_to_num()), (what, name)
            assert torch.equal(found[name].isnan(), x.isnan()), (what, name)

    def do(self, step, counts, number):
        if step != "same batch" or self.batch is None or self.batch[0].dtype != self.dtype:
            self.drawn_batch(counts, number)
        module = self.module
        if step in ("forward", "same batch"):
            self.compare(0, number, step)
        elif step == "backward":
            self.compare(1, number, step)
        elif step == "double backward":
            self.compare(2 if self.smooth and self.dtype != torch.bfloat16 else 1, number, step)
        elif step == "no_grad":
            with torch.no_grad():
                self.compare(0, number, step)
        elif step == "inference":
            with torch.inference_mode():
                self.compare(0, number, step)
        elif step == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                self.compare(number % 2, number, step)
        elif step == "deepcopy":
            self.module = copy.deepcopy(module)
        elif step == "pickle":
            self.module = pickle.loads(pickle.dumps(module))
        elif step == "saved":
            file = io.BytesIO()
            torch.save(module.state_dict(), file)
            file.seek(0)
            module.load_state_dict(torch.load(file, weights_only=True))
        elif step in ("float64", "float32", "bfloat16"):
            self.dtype = getattr(torch, step)
            assert module.to(self.dtype) is module
        elif step in ("train", "eval"):
            getattr(module, step)()
        elif step == "step":
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.01 * torch.ones_like(p)) if number % 2 else p.data.mul_(1.01)
        elif step in ("frozen", "thawed"):
            for i, p in enumerate(module.parameters()):
                if i % 3 == number % 3:
                    p.requires_grad_(step == "thawed")
        elif step == "new parameter":
            for child in module.modules():
                for name, p in list(child._parameters.items()):
                    if p is not None:
                        made = torch.nn.Parameter(p.detach() * 0.9, p.requires_grad)
                        setattr(child, name, made)
        elif step == "wrong call":
            with pytest.raises((TypeError, ValueError)):
                self.call(module, self.batch[0][:, :-1].int(), self.batch[1])
        elif step == "threads":
            torch.set_num_threads(1 + number % 3)
        elif step == "functional":
            state = {n: p.detach() * 1.1 for n, p in module.named_parameters()}
            torch.func.functional_call(module, state, self.functional_arguments())
        elif step == "meta" and module is not None:
            with torch.device("meta"):
                self.make()

    def functional_arguments(self):
        x, ptr = self.batch
        aggregation = isinstance(self.module, torch_geometric.nn.aggr.Aggregation)
        return (x, None, ptr) if aggregation else (x, ptr)


@drawn(40, name=st.sampled_from(sorted(MODULES)), steps=sequences)
def test_sequences(name, steps):
    runner, threads = Runner(name), torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for step in steps:
                runner.do(*step)
            runner.do("backward", [3, 0, 2], 5)
        finally:
            torch.set_num_threads(threads)


@drawn(15, counts=COUNTS, order=st.randoms(use_true_random=False), extra=st.integers(0, 2))
def test_drop_in_for_any_index(counts, order, extra):
    """Unsorted indices, empty groups and ptr give what torch_geometric's own class gives."""
    torch.manual_seed(1)
    options = {"num_seed_points": 2, "heads": 2}
    ours = pyg.SetTransformerAggregation(C, **options).double()
    theirs = torch_geometric.nn.aggr.SetTransformerAggregation(C, **options).double()
    theirs.load_state_dict(ours.state_dict())
    index = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
    x = torch.randn(len(index), C, dtype=torch.float64)
    size = len(counts) + extra
    place = list(range(len(index)))
    order.shuffle(place)
    found = ours(x[place], index[place], dim_size=size)
    by_ptr = ours(x, ptr=Ragged.from_counts([*counts, *[0] * extra]).ptr)
    assert torch.allclose(found, by_ptr, atol=1e-12)
    if len(index):
        wanted = theirs(x, index, dim_size=size)
        filled = [i for i, n in enumerate(counts) if n]
        assert torch.allclose(found[filled], wanted[filled], atol=1e-12)
