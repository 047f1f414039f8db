"""Adapters to other libraries: against the oracle where the library runs, else on stand-ins."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch
from tools import stand_ins

from attnpool_kernels import (
    BackendError,
    Problem,
    Ragged,
    autograd,
    backends,
    dispatch,
    explain,
    impl,
    seed_pool,
    set_attention,
    testing,
)
from attnpool_kernels.impl import flash_attn, flex, packing, varlen, xformers
from attnpool_kernels.operands import Operands

PLAIN = [case for case in testing.CASES if not case.dropout]
NO_BIAS = [case for case in PLAIN if not case.bias and not case.key_bias]
GPU = Problem("cuda", torch.float16, 32, 32, capability=(9, 0), grad_order=1)
PTR = torch.tensor([0, 5, 9])


@pytest.fixture(autouse=True)
def _fresh_caches():
    yield
    stand_ins.forget()


@pytest.fixture(params=stand_ins.MODULES)
def stand_in(request, monkeypatch):
    torch.use_deterministic_algorithms(False)
    backend = stand_ins.install(monkeypatch, request.param)
    yield backend
    monkeypatch.undo()


def attend(batch, inputs, backend, return_lse=False):
    q, k, v = (inputs[name] for name in "qkv")
    options = {
        "bias": inputs.get("bias"),
        "key_bias": inputs.get("key_bias"),
        "scale": batch.scale,
        "backend": backend,
        "return_lse": return_lse,
    }
    if batch.q_ptr is None:
        return seed_pool(q, k, v, batch.k_ptr, **options)
    return set_attention(q, k, v, batch.q_ptr, batch.k_ptr, **options)


def judge(case, dtype, backend, lse, gradients=True, slack=1.0):
    """Values and first gradients of a backend against the budget."""
    batch = replace(case, lse=False).make(dtype)

    def run(attention, kind):
        inputs = {
            name: x.detach().to(kind).requires_grad_(gradients)
            for name, x in batch.inputs().items()
        }
        result = dict(zip(("out", "lse"), attention(inputs)))
        if gradients:
            leaves = list(inputs.values())
            first = torch.autograd.grad(result["out"], leaves, batch.dout.to(kind))
            result |= {f"d{name}": x for name, x in zip(inputs, first)}
        return result

    def ours(inputs):
        own = {name: x.dtype for name, x in batch.inputs().items()}
        found = attend(batch, {name: x.to(own[name]) for name, x in inputs.items()}, backend, lse)
        return found if lse else (found,)

    found = run(ours, dtype)
    assert found["out"].is_contiguous() and found["out"].dtype == dtype
    truth = run(lambda x: testing.dense(batch, torch.float64, x), torch.float64)
    truth = {name: x.detach() for name, x in truth.items() if name in found}
    found = {name: x.detach() for name, x in found.items()}
    variances = testing.budget(batch, dtype)
    assert not testing.violations(found, truth, variances, slack), case.name


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sdpa(case, dtype):
    # torch's fused CPU backward adds the blocks of dk and dv up in bfloat16
    judge(case, dtype, "sdpa", lse=False, slack=2.0 if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_flex(case):
    judge(case, torch.float32, "flex", lse=True, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_flex_in_other_dtypes(dtype):
    judge(testing.CASES[0], dtype, "flex", lse=True, gradients=False)


@pytest.mark.parametrize("counts", [(100, 200, 3, 150), (128, 128), (1,) * 300, (129, 127, 500)])
def test_flex_block_mask_is_that_of_the_pairs(counts):
    from torch.nn.attention.flex_attention import create_block_mask

    q_counts = counts[::-1]
    q_ptr, k_ptr = (torch.tensor([0, *n]).cumsum(0) for n in (q_counts, counts))
    q, k = torch.zeros(sum(q_counts), 1, 8), torch.zeros(sum(counts), 1, 8)
    batch = packing.pack(Operands.plain(q, k, k, q_ptr, k_ptr), None)
    q_of, k_of = flex._molecules(batch.q_ptr, q), flex._molecules(batch.k_ptr, k)
    found = flex._mask(batch, q_of, k_of).to_dense()
    exact = create_block_mask(lambda b, h, i, j: q_of[i] == k_of[j], 1, 1, len(q), len(k), "cpu")
    assert torch.equal(found.bool(), exact.to_dense().bool())


def test_flex_is_used_by_name_only():
    assert impl.PRIORITY.index("flex") > impl.PRIORITY.index("reference")
    q = torch.randn(9, 2, 4, requires_grad=True)
    with pytest.raises(BackendError, match=r"flex.*no backward"):
        set_attention(q, q, q, PTR, backend="flex")


@pytest.mark.parametrize("case", NO_BIAS, ids=lambda case: case.name)
def test_layout(case, monkeypatch):
    torch.use_deterministic_algorithms(False)
    for name in ("flash_attn 2", "xformers"):
        backend = stand_ins.install(monkeypatch, name)
        judge(case, torch.float16, backend, lse=backend != "xformers")


@pytest.mark.parametrize("case", NO_BIAS[4:11:2], ids=lambda case: case.name)
def test_layout_of_every_library(stand_in, case):
    """The others differ in their signatures only."""
    if flash_attn.versions(None) == (4,) and case.dim > 128:
        with pytest.raises(BackendError, match="needs at most 128"):
            judge(case, torch.bfloat16, stand_in, lse=True)
        return
    judge(case, torch.bfloat16, stand_in, lse=stand_in != "xformers")


def test_more_molecules_than_the_grid_of_the_library(stand_in, monkeypatch):
    monkeypatch.setattr(packing, "GRID", 3)
    for seeds in (None, 2):
        case = testing.Case("many", (4, 1, 0, 7, 3, 5, 2, 6), dim=12, seeds=seeds, nobody=1)
        stand_ins.calls.clear()
        judge(case, torch.float16, stand_in, lse=stand_in != "xformers")
        assert [n for _, n in stand_ins.calls] == [3, 3, 1]


def test_sdpa_with_more_molecules_than_the_grid(monkeypatch):
    monkeypatch.setattr(packing, "GRID", 3)
    for bias in (None, "mask"):
        case = testing.Case("many", (4, 1, 0, 7, 3, 5, 2, 6), bias=bias, nobody=1)
        judge(case, torch.float64, "sdpa", lse=False)


def test_nothing_is_asked_of_the_library_without_molecules(stand_in):
    q = torch.randn(4, 2, 8, dtype=torch.float16, requires_grad=True)
    out = set_attention(q, q, q, torch.tensor([0, 0, 0]), backend=stand_in)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert not out.any() and not dq.any() and not stand_ins.calls


@pytest.mark.parametrize("backend", ["sdpa", "stand-ins"])
def test_nan_stays_in_its_molecule(backend, monkeypatch):
    """Also from rows of nobody, and from molecules that have queries only or keys only."""
    q_counts, counts = (3, 5, 4, 0, 6), (4, 5, 0, 7, 2)
    q_ptr, k_ptr = (torch.tensor([0, *n]).cumsum(0) for n in (q_counts, counts))
    clean = [torch.randn(n, 2, 8, dtype=torch.float16) for n in (20, 20, 20)]
    dirty = [x.clone() for x in clean]
    for x, ptr in zip(dirty, (q_ptr, k_ptr, k_ptr)):
        for i in (1, 2, 3):  # sound before and after
            x[ptr[i] : ptr[i + 1]] = torch.nan
        x[ptr[-1] :] = torch.inf
    names = ["sdpa"] if backend == "sdpa" else stand_ins.MODULES
    if backend == "stand-ins":
        torch.use_deterministic_algorithms(False)
    for name in names:
        with monkeypatch.context() as patch:
            chosen = name if backend == "sdpa" else stand_ins.install(patch, name)
            results = []
            for tensors in (clean, dirty):
                leaves = [x.clone().requires_grad_() for x in tensors]
                out = set_attention(*leaves, q_ptr, k_ptr, backend=chosen)
                results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        for good, bad, ptr in zip(*results, (q_ptr, q_ptr, k_ptr, k_ptr)):
            for i in (0, 4):
                own = slice(ptr[i], ptr[i + 1])
                assert torch.equal(good[own], bad[own]), name
            for i in (2, 3):  # no keys, no queries
                assert not bad[ptr[i] : ptr[i + 1]].any(), name
            assert not bad[ptr[-1] :].any(), name


def test_garbage_boundaries_stay_inside():
    """Contents on a GPU are not checked before, and the libraries trust them."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        q, k = torch.zeros(7, 1, 8), torch.zeros(5, 1, 8)
        q_ptr, k_ptr = torch.randint(-9, 20, (2, 4), generator=generator)
        if trial % 10 == 0:
            q_ptr[1], k_ptr[2] = 2**63 - 1, -(2**63)
        batch = packing.pack(Operands.plain(q, k, k, q_ptr, k_ptr), None)
        for rows, ptr, longest in (
            (batch.q, batch.q_ptr, batch.longest_q),
            (batch.k, batch.k_ptr, batch.longest_k),
        ):
            counts = ptr.diff()
            assert ptr[0] == 0 and ptr[-1] == rows.shape[0] and bool((counts > 0).all())
            assert longest == (counts.max() if len(counts) else 0)
        assert batch.restore(batch.q, 0.0).shape == q.shape


# --- once for all layers ----------------------------------------------------------------------


@pytest.fixture
def readings(monkeypatch):
    """The number of rows of every reading of boundaries."""
    found = []
    read = packing._layout

    def counted(x):
        found.append((x.q.shape[0], x.k.shape[0]))
        return read(x)

    monkeypatch.setattr(packing, "_layout", counted)
    return found


def test_layers_that_share_a_ragged_read_it_once(stand_in, readings):
    sizes, keys = Ragged.from_counts([5, 0, 4]), Ragged.from_counts([3, 2, 6])
    q, k = (torch.randn(n, 2, 8, dtype=torch.float16, requires_grad=True) for n in (10, 11))
    one = set_attention(q, q, q, sizes.ptr.clone(), backend=stand_in)
    for _ in range(3):
        out = set_attention(q, q, q, sizes, backend=stand_in)
        assert torch.equal(out, one)
        torch.autograd.grad(out.sum(), q)
    assert readings == [(10, 10)] * 2
    with torch.inference_mode():  # its tensors are of no use to a layer that trains
        set_attention(q, q, q, sizes, backend=stand_in)
    torch.autograd.grad(set_attention(q, q, q, sizes, backend=stand_in).sum(), q)
    assert readings == [(10, 10)] * 3
    for _ in range(2):
        set_attention(q, k, k, sizes, keys, backend=stand_in)
        seed_pool(q[:2], k, k, keys, backend=stand_in)
        set_attention(q[:9], q[:9], q[:9], sizes, backend=stand_in)
    assert readings[3:] == [(10, 11), (2, 11), (9, 9)]


def test_changed_or_forgotten_boundaries_are_read_again(readings):
    q = torch.randn(9, 2, 8)
    sizes = Ragged.from_counts([5, 4])
    first = set_attention(q, q, q, sizes, backend="sdpa")
    sizes.ptr[1] = 2
    second = set_attention(q, q, q, sizes, backend="sdpa")
    assert len(readings) == 2 and not torch.allclose(first, second)
    assert torch.equal(second, set_attention(q, q, q, torch.tensor([0, 2, 9]), backend="sdpa"))
    for counts in ([1, 8], [8, 1], [3, 6]):  # often at the address of the one before
        own = set_attention(q, q, q, Ragged.from_counts(counts), backend="sdpa")
        ptr = torch.tensor([0, counts[0], 9])
        assert torch.equal(own, set_attention(q, q, q, ptr, backend="sdpa"))
    (entry,) = sizes.kept.values()
    layout = weakref.ref(entry[2])
    del entry, sizes
    assert layout() is None  # nothing outlives its Ragged


# --- second derivatives -----------------------------------------------------------------------


def forces_loss(x, weight, backend, ptr=PTR):
    """A loss on the gradient of an energy, as in training on forces."""
    rows = torch.einsum("nhd,de->nhe", x, weight)
    out = set_attention(rows, rows, rows.tanh(), ptr, backend=backend)
    (force,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)  # constant cotangent
    return force.float().square().sum()


def both_styles(backend, dtype):
    x = torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for style in ("backward", "grad"):
        leaf, parameter = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = forces_loss(leaf, parameter, backend)
        if style == "backward":
            loss.backward()
            found.append(parameter.grad)
        else:
            found.append(torch.autograd.grad(loss, parameter)[0])
    return found


def needs_native():
    problem = Problem("cpu", torch.float32, 8, 8, grad_order=2)
    if not any(
        impl.load(name).KIND == "kernel" and not impl.load(name).why_not(problem)
        for name in backends()
    ):
        pytest.skip("no native kernel backend is built here")


def test_second_derivative_is_ours_where_a_native_kernel_can_serve(stand_in):
    needs_native()
    exact = both_styles("reference", torch.float64)[0]
    allowed = 1.5 * (both_styles("reference", torch.bfloat16)[0].double() - exact).norm()
    for found in both_styles(stand_in, torch.bfloat16):
        assert (found.double() - exact).norm() < allowed < 0.1 * exact.norm()


@pytest.mark.parametrize(
    "case",
    [case for case in PLAIN if case.name in ("bias", "empty among them", "four seeds")],
    ids=lambda case: case.name,
)
def test_sdpa_to_second_order(case):
    needs_native()
    case = replace(case, lse=False)

    def run(batch):
        return testing.differentiate(
            lambda x: (attend(batch, x, "sdpa"), torch.zeros(0)), batch, None
        ) | {"lse": testing.dense(batch, torch.float64, batch.inputs())[1]}

    testing.judge(case, torch.float64, run)


def test_derivative_of_the_lse_is_ours(stand_in):
    if stand_in == "xformers":
        pytest.skip("no LSE")
    needs_native()
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.float16, requires_grad=True) for _ in range(3))
    found = []
    for backend in (stand_in, "reference"):
        out, lse = set_attention(q, k, v, PTR, backend=backend, return_lse=True)
        both = out.sum() + lse.square().sum()
        found.append(torch.autograd.grad(both, (q, k, v), retain_graph=True))
        found.append(torch.autograd.grad(lse.sum(), (q, k)))
    for ours, exact in zip(found[0] + found[1], found[2] + found[3]):
        assert torch.allclose(ours, exact, atol=4e-3)


@pytest.mark.parametrize("name", ["sdpa", *stand_ins.MODULES])
def test_no_native_kernel_no_second_derivative(name, monkeypatch):
    """In both call styles, for a constant incoming gradient too; the first order still works."""
    torch.use_deterministic_algorithms(False)
    backend = name if name == "sdpa" else stand_ins.install(monkeypatch, name)
    monkeypatch.setattr(autograd, "_native", lambda *_: None)
    expected = f"{backend}.*no second derivative.*create_graph.*reference"
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = set_attention(q, k, v, PTR, backend=backend)
    for cotangent in (torch.ones_like(out), torch.ones_like(out).requires_grad_()):
        with pytest.raises(NotImplementedError, match=expected):
            torch.autograd.grad(out, q, cotangent, create_graph=True)
        with pytest.raises(NotImplementedError, match=expected):
            out.backward(cotangent, create_graph=True)
    out.sum().backward()
    assert q.grad.isfinite().all()
    if name not in ("sdpa", "xformers"):
        out, lse = set_attention(q, k, v, PTR, backend=backend, return_lse=True)
        with pytest.raises(NotImplementedError, match=f"{backend}.*no derivative of its LSE"):
            (out.sum() + lse.sum()).backward()


def test_third_derivative_raises():
    needs_native()
    x = torch.randn(9, 2, 8, dtype=torch.float64, requires_grad=True)
    out = set_attention(x, x, x, PTR, backend="sdpa")
    for _ in range(2):
        (out,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(out.sum(), x)


def test_graph_is_freed_and_retained_as_asked():
    q = torch.randn(9, 2, 8, requires_grad=True)
    out = set_attention(q, q, q, PTR, backend="sdpa")
    (first,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (again,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), q)


def test_gradient_for_a_subset(stand_in):
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.float16) for _ in range(3))
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(set_attention(*full, PTR, backend=stand_in).sum(), full)
    some = [q, k.clone().requires_grad_(), v]
    set_attention(*some, PTR, backend=stand_in).sum().backward()
    assert torch.equal(some[1].grad, exact[1]) and q.grad is None
    assert not set_attention(q, k, v, PTR, backend=stand_in).requires_grad


# --- reasons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device": "cpu", "capability": None}, "tensors on cpu: needs cuda"),
        ({"capability": (7, 5)}, "sm_75"),
        ({"dtype": torch.float32}, "float32: needs float16 or bfloat16"),
        ({"head_dim": 264}, "head dimension 264"),
        ({"value_dim": 300}, "value dimension 300"),
        ({"bias": True}, "bias"),
        ({"dropout": True}, "dropout"),
        ({"grad_order": 2}, "first derivative only"),
    ],
)
def test_reasons(change, text):
    for module in (flash_attn, xformers, varlen):
        assert any(text in reason for reason in module.why_not(replace(GPU, **change)))


def test_reasons_of_one_library():
    assert any("return_lse" in x for x in xformers.why_not(replace(GPU, return_lse=True)))
    for module in (xformers, varlen):
        assert any("deterministic" in x for x in module.why_not(replace(GPU, deterministic=True)))
    cpu = replace(GPU, device="cpu", capability=None)
    assert any("no backward" in x for x in flex.why_not(cpu))
    assert any("needs cpu or cuda" in x for x in flex.why_not(replace(GPU, device="mps")))
    assert any("float64" in x for x in flex.why_not(replace(GPU, dtype=torch.float64)))
    assert not flex.why_not(replace(cpu, grad_order=0, bias=True, return_lse=True))


def test_missing_package_is_a_reason(monkeypatch, capsys):
    for name in ("flash_attn", "flash_attn_interface", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    stand_ins.forget()
    explain(GPU)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "flash_attn_interface is not installed" in lines["flash_attn"]
    assert "flash_attn is not installed" in lines["flash_attn"]
    assert "xformers" in lines["xformers"] and "  -  " in lines["xformers"]
    with pytest.raises(BackendError, match="'flash_attn' cannot serve"):
        dispatch.select(GPU, "flash_attn")


def test_broken_package_is_a_reason(monkeypatch, tmp_path):
    for name, line in (
        ("flash_attn", "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')"),
        ("xformers", "raise RuntimeError('built for another torch')"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line)
        for loaded in [x for x in sys.modules if x.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    stand_ins.forget()
    ampere = replace(GPU, capability=(8, 0))
    (reason,) = flash_attn.why_not(ampere)
    assert "ImportError" in reason and "undefined symbol: _ZN3c10" in reason
    (reason,) = xformers.why_not(ampere)
    assert "RuntimeError: built for another torch" in reason


def test_versions_of_flash_attn():
    assert flash_attn.versions((8, 6)) == (2,) and flash_attn.versions((9, 0))[0] == 3
    assert flash_attn.versions((10, 0))[0] == 4 and flash_attn.versions(None) == (2,)


def test_old_flash_attn_has_no_packed_lse(monkeypatch):
    stand_ins.install(monkeypatch, "flash_attn 2")
    monkeypatch.setattr(sys.modules["flash_attn"], "__version__", "2.5.9")
    problem = Problem("cpu", torch.float16, 32, 32, return_lse=True)
    assert any("2.6" in reason for reason in flash_attn.why_not(problem))
    assert not flash_attn.why_not(replace(problem, return_lse=False))


def test_deterministic_mode_reaches_flash_attn(monkeypatch):
    """conftest has it on: the stand-in compares its option with the mode."""
    stand_ins.install(monkeypatch, "flash_attn 2")
    q = torch.randn(9, 2, 8, dtype=torch.float16, requires_grad=True)
    set_attention(q, q, q, PTR, backend="flash_attn").sum().backward()
    assert q.grad.isfinite().all()


def test_signature_of_torchs_varlen():
    """What the adapter uses is what this torch documents."""
    import inspect

    known = pytest.importorskip("torch.nn.attention.varlen")
    parameters = inspect.signature(known.varlen_attn).parameters
    names = list(inspect.signature(stand_ins.varlen_attn).parameters)
    if "scale" not in parameters:
        found = impl.load("varlen").why_not(Problem("cuda", torch.bfloat16, 16, 16))
        assert "this torch's varlen_attn takes no scale" in found
        return
    assert list(parameters)[:7] == names[:7] and {"return_aux", "scale"} <= set(parameters)
