"""New modules have the default dtype and device, as all of torch, and the same numbers in each."""

import pytest
import torch
from test_process_defaults import BACKBONES, SETTINGS, C, pooled, water

from attnpool_kernels.nn import PAPER, AttentionPooling


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", BACKBONES)
def test_models_have_the_same_numbers_rounded_to_the_default(name, setting):
    torch.manual_seed(6)
    plain = pooled(name)
    with SETTINGS[setting]():
        torch.manual_seed(6)
        model = pooled(name)
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.device.type for p in model.parameters()} == {device.type}
    tensors = dict(model.backbone.named_parameters()) | dict(model.backbone.named_buffers())
    if device.type == "cpu":
        plain = plain.to(dtype)
        wanted = dict(plain.backbone.named_parameters()) | dict(plain.backbone.named_buffers())
        for key, x in tensors.items():
            assert x.dtype == dtype and torch.equal(x, wanted[key]), key
    else:  # the usual way of a large model: no memory, then the weights of a checkpoint
        model = model.to_empty(device="cpu")
        model.load_state_dict(plain.state_dict())
        molecules = water(torch.float32)
        assert torch.equal(model(molecules), plain(molecules))
    if dtype.itemsize >= 4:
        molecules = water()
        given = molecules.z, molecules.pos, molecules.ragged
        found, wanted = (made.backbone.double()(*given) for made in (model, plain))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["dimenet", "dimenet++"])
def test_constants_do_not_remember_other_dtypes(name):
    """They are no part of a state dict: a float32 step on the way must leave no trace."""
    torch.manual_seed(7)
    model = pooled(name).backbone
    found = {}
    for way, made in {
        "direct": lambda: model.double(),
        "by float16": lambda: model.half().double(),
        "by bfloat16 and float32": lambda: model.bfloat16().float().double(),
    }.items():
        made()
        found[way] = model.sbf.norms.clone(), model.sbf.zeros.clone()
        assert model.sbf.norms.dtype == torch.float64
    for way, tensors in found.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, found["direct"])), way


@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_have_the_default_dtype_and_device(setting):
    with SETTINGS[setting]():
        model = AttentionPooling(C, C, heads=2, seeds=2, **PAPER)
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        x = torch.randn(10, C)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, device.type)}
    out = model(x, torch.tensor([0, 3, 3, 8, 10]))
    assert out.shape == (4, C) and (out.dtype, out.device.type) == (dtype, device.type)
    assert device.type == "meta" or bool(out.isfinite().all())
