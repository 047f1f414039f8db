"""Whatever is put on or in the place of a layer inside a block acts: hooks, adapters, norms."""

import contextlib
import copy
import functools

import pytest
import torch
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from attnpool_kernels import Ragged
from attnpool_kernels.nn import (
    ISAB,
    MAB,
    PAPER,
    PMA,
    PYG,
    SAB,
    AttentionalPooling,
    AttentionPooling,
    OrbitalWeightedAverage,
    SeedPooling,
    SetAttention,
    SetTransformer,
    WeightedAverage,
)

C = 8
COUNTS = (3, 0, 5, 1)
BLOCK = {name: value for name, value in PAPER.items() if name != "pre_linear"}


def aggregation(**options):
    pyg = pytest.importorskip("attnpool_kernels.zoo.pyg")
    return pyg.SetTransformerAggregation(C, heads=2, **options)


MODULES = {
    "attention": lambda: SetAttention(C, 2),
    "mab": lambda: MAB(C, 2),
    "mab of the paper": lambda: MAB(C, 2, **BLOCK),
    "sab": lambda: SAB(C, 2, activation="silu"),
    "isab": lambda: ISAB(C, 3, 2, **BLOCK),
    "pma": lambda: PMA(C, 2, 2, **PAPER),
    "absorbed": lambda: PMA(32, 1, 1, in_dim=C, pre_linear=True),
    "set transformer": lambda: SetTransformer(C, C, 3, heads=2, seeds=2, **PAPER),
    "set transformer of pyg": lambda: SetTransformer(C, C, 3, heads=2, **PYG),
    "induced": lambda: SetTransformer(C, C, 3, heads=2, points=3, reduce="concat"),
    "abp": lambda: AttentionPooling(C, C, 3, heads=2, seeds=2),
    "abp of one seed": lambda: AttentionPooling(C, C, 3, heads=2, seeds=1, activation="silu"),
    "phantom": lambda: AttentionPooling(C, C, 3, heads=2, seeds=2, phantom=6),
    "seeds": lambda: SeedPooling(C, C, heads=2, seeds=2, **PAPER),
    "gated": lambda: AttentionalPooling(C, 3, hidden=4),
    "weighted": lambda: WeightedAverage(C, 2, hidden=(4,)),
    "orbital": lambda: OrbitalWeightedAverage(C, 2, hidden=(4, 3)),
    "aggregation": lambda: aggregation(num_seed_points=2),
    "aggregation of one": lambda: aggregation(layer_norm=True, concat=False),
}


def made(name):
    """A module in float64 with no parameter at a value that hides another's, and no ReLU off."""
    module = MODULES[name]().double()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sum(COUNTS), C, generator=generator, dtype=torch.float64).to(dtype)


def run(module, x):
    ptr = Ragged.from_counts(COUNTS).ptr
    return module(x, ptr=ptr)


def values(module):
    """Results and the gradient of the rows, for a fixed cotangent."""
    x = rows().requires_grad_()
    out = run(module, x)
    (gradient,) = torch.autograd.grad(
        (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum(), x
    )
    return out.detach(), gradient


@functools.cache
def unchanged(name):
    return values(made(name))


class Lora(torch.nn.Module):
    """What adapters put in the place of a layer: it and a product of two small matrices."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LoraSubclass(torch.nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Scaled(torch.nn.Module):
    def forward(self, x):
        return 1.5 * x


def lora(model, path, layer, stack):
    new = Lora(layer)
    model.set_submodule(path, new)
    return layer.weight + new.up.weight @ new.down.weight, layer.bias


def subclass(model, path, layer, stack):
    new = LoraSubclass(layer.in_features, layer.out_features, dtype=torch.float64)
    new.load_state_dict(layer.state_dict())
    model.set_submodule(path, new)
    return 1.5 * layer.weight, 1.5 * layer.bias


def changed_class(model, path, layer, stack):
    layer.__class__ = LoraSubclass
    return 1.5 * layer.weight, 1.5 * layer.bias


def changed_forward(model, path, layer, stack):
    before = layer.forward
    layer.forward = lambda x: 1.5 * before(x)
    return 1.5 * layer.weight, 1.5 * layer.bias


def no_bias(model, path, layer, stack):
    layer.bias = None
    return layer.weight, torch.zeros_like(layer.weight[:, 0])


def forward_hook(model, path, layer, stack):
    layer.register_forward_hook(lambda module, args, out: 1.5 * out)
    return 1.5 * layer.weight, 1.5 * layer.bias


def forward_pre_hook(model, path, layer, stack):
    layer.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    return 0.5 * layer.weight, layer.bias


def global_forward_hook(model, path, layer, stack):
    handle = hooks.register_module_forward_hook(
        lambda module, args, out: 1.5 * out if module is layer else None
    )
    stack.callback(handle.remove)
    return 1.5 * layer.weight, 1.5 * layer.bias


def global_forward_pre_hook(model, path, layer, stack):
    handle = hooks.register_module_forward_pre_hook(
        lambda module, args: (0.5 * args[0],) if module is layer else None
    )
    stack.callback(handle.remove)
    return 0.5 * layer.weight, layer.bias


def parametrized(model, path, layer, stack):
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer.weight, layer.bias


def parametrized_bias(model, path, layer, stack):
    parametrize.register_parametrization(layer, "bias", Scaled())
    return layer.weight, layer.bias


def weight_norm(model, path, layer, stack):
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)
    return layer.weight, layer.bias


def spectral_norm(model, path, layer, stack):
    parametrizations.spectral_norm(layer)
    layer.eval()  # or every look at the weight is another step of the power iteration
    return layer.weight, layer.bias


def weight_norm_of_old(model, path, layer, stack):
    old = layer.weight.detach().clone()
    old_weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)
    return 1.5 * old, layer.bias


def spectral_norm_of_old(model, path, layer, stack):
    old_spectral_norm(layer)
    model.eval()
    u, v, weight = layer.weight_u, layer.weight_v, layer.weight_orig
    return weight / (u @ weight @ v), layer.bias


def pruned(model, path, layer, stack):
    old = layer.weight.detach().clone()
    mask = torch.arange(old.numel()).view_as(old) % 2
    prune.custom_from_mask(layer, "weight", mask)
    with torch.no_grad():
        layer.weight_orig.mul_(1.5)  # as a step of the optimizer: the mask is applied once more
    return 1.5 * old * mask, layer.bias


def pruned_bias(model, path, layer, stack):
    old = layer.bias.detach().clone()
    mask = torch.arange(len(old)) % 2
    prune.custom_from_mask(layer, "bias", mask)
    with torch.no_grad():
        layer.bias_orig.mul_(1.5)
    return layer.weight, 1.5 * old * mask


KINDS = (
    lora,
    subclass,
    changed_class,
    changed_forward,
    no_bias,
    forward_hook,
    forward_pre_hook,
    global_forward_hook,
    global_forward_pre_hook,
    parametrized,
    parametrized_bias,
    weight_norm,
    spectral_norm,
    weight_norm_of_old,
    spectral_norm_of_old,
    pruned,
    pruned_bias,
)


def linears(module):
    return [path for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_what_changes_a_layer_acts(name, kind):
    """As a module whose plain layer has the weight and the bias that come to the same."""
    before = unchanged(name)
    for path in linears(made(name)):
        torch.manual_seed(3)
        model, plain = made(name), made(name)
        with contextlib.ExitStack() as stack:
            weight, bias = kind(model, path, model.get_submodule(path), stack)
            found = values(model)
        layer = plain.get_submodule(path)
        layer.weight, layer.bias = (torch.nn.Parameter(x.detach().clone()) for x in (weight, bias))
        wanted = values(plain)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        # the bias of a gate's last layer shifts all logits, and that changes nothing
        shifts = path.startswith("gate") and weight.shape[0] == 1
        if not (shifts and kind in (no_bias, parametrized_bias, pruned_bias)):
            assert (wanted[0] - before[0]).abs().max() > 1e-6, path


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_backward_hooks_act(name, everywhere, pre):
    """A hook that changes the gradient of a layer's input or output, as the layer's own formula."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return 2.0 * dout

    class Wanted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return Changed.apply(self.layer(x)) if pre else self.layer(Changed.apply(x))

    for path in linears(made(name)):
        model, plain = made(name), made(name)
        layer = model.get_submodule(path)

        def hook(module, *gradients, layer=layer):
            return (2.0 * gradients[0][0],) if module is layer else None

        if everywhere:
            kinds = (
                hooks.register_module_full_backward_hook,
                (hooks.register_module_full_backward_pre_hook),
            )
            handle = kinds[pre](hook)
        else:
            kinds = layer.register_full_backward_hook, layer.register_full_backward_pre_hook
            handle = kinds[pre](hook)
        try:
            found = values(model)
        finally:
            handle.remove()
        plain.set_submodule(path, Wanted(plain.get_submodule(path)))
        for a, b in zip(found, values(plain)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.skipif(
    torch.backends.quantized.engine in (None, "none"), reason="torch has no quantised layers here"
)
@pytest.mark.parametrize("name", MODULES)
def test_dynamic_quantisation_acts(name):
    module = made(name).float().eval()
    if not linears(module):
        pytest.skip("no linear layers")
    quantised = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, torch.qint8)
    inside = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(inside) == len(linears(module))
    calls = []
    for layer in inside:
        layer.register_forward_hook(lambda layer, args, out: calls.append((layer, args[0], out)))
    with torch.no_grad():
        out, before = run(quantised, rows(torch.float32)), run(module, rows(torch.float32))
    assert {id(layer) for layer, _, _ in calls} == {id(layer) for layer in inside}
    for layer, x, y in calls:  # eight bits: steps of 1/127 of the largest, of x and of the weight
        wide = torch.nn.functional.linear(x, layer.weight().dequantize(), layer.bias())
        step = x.abs().max() / 127
        assert (y - wide).abs().max() <= step * layer.weight().dequantize().abs().sum(1).max()
    assert out.shape == before.shape and not torch.equal(out, before)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_inside_is_called(name):
    """Hooks on the blocks themselves too, which wrappers (sharding, checkpointing) rely on."""
    module = made(name)
    inside = {
        path: m for path, m in module.named_modules() if not isinstance(m, torch.nn.ModuleList)
    }
    seen = set()
    for path, m in inside.items():
        m.register_forward_pre_hook(lambda m, args, path=path: seen.add(path))
    values(module)
    assert seen == set(inside)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_can_be_pruned(name):
    """Pruning is a hook before the forward of the module that owns the parameter."""
    for key, _ in made(name).named_parameters():
        model, plain = made(name), made(name)
        path, _, own = key.rpartition(".")
        owner = model.get_submodule(path)
        mask = torch.arange(getattr(owner, own).numel()).view_as(getattr(owner, own)) % 2
        prune.custom_from_mask(owner, own, mask)
        with torch.no_grad():
            getattr(owner, f"{own}_orig").mul_(1.5)
            plain.get_parameter(key).mul_(1.5 * mask)
        for a, b in zip(values(model), values(plain)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_pooling_with_weights_is_called():
    pool = made("weighted")
    pool.register_forward_hook(lambda module, args, out: tuple(2 * x for x in out))
    x, ptr = rows(), Ragged.from_counts(COUNTS).ptr
    y, weights = made("weighted").with_weights(x, ptr)
    for a, b in zip(pool.with_weights(x, ptr), (2 * y, 2 * weights)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_hook_keeps_is_not_overwritten(name):
    """A ReLU in the memory of the layer's result would change what a hook has kept of it."""
    model, kept = made(name), []
    for path in linears(model):
        model.get_submodule(path).register_forward_hook(
            lambda layer, args, out: kept.append((layer, args[0], out))
        )
    run(model, rows())
    for layer, x, out in kept:
        torch.testing.assert_close(out, torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", [lora, forward_hook, weight_norm], ids=lambda x: x.__name__)
def test_changed_layers_compile_and_copy(kind):
    model = made("set transformer")
    for path in linears(model):
        kind(model, path, model.get_submodule(path), None)
    x, ptr = rows(), Ragged.from_counts(COUNTS).ptr
    wanted = model(x, ptr)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, ptr), wanted)
    torch.testing.assert_close(copy.deepcopy(model)(x, ptr), wanted)


def test_few_wrapped_layers_leave_the_others_fast():
    """A hook on one layer costs nothing elsewhere: the others keep their node of the graph."""
    model = made("set transformer")
    model.pma.mab.lin.register_forward_hook(lambda module, args, out: None)
    names, todo, seen = [], [run(model, rows()).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            todo += [parent for parent, _ in node.next_functions]
    assert sum("AddReluLinear" in name for name in names) == 3
