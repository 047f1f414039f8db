"""flash-attn's spelling: its contract, its conventions, and its own tests where a checkout is."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnpool_kernels import set_attention, testing
from attnpool_kernels.compat import flash_attn_varlen_func as varlen
from attnpool_kernels.dropout import keep_mask

HARNESS = Path(__file__).parent / "tools" / "flash_attn_suite.py"
CU_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
CU_K = torch.tensor([0, 4, 6, 6], dtype=torch.int32)


def tensors(heads=4, k_heads=4, dim=8, value_dim=None, dtype=torch.float32):
    value_dim = value_dim or dim
    return [
        torch.randn(rows, h, width, dtype=dtype, requires_grad=True)
        for rows, h, width in ((9, heads, dim), (7, k_heads, dim), (7, k_heads, value_dim))
    ]


def call(q, k, v, cu_q=CU_Q, cu_k=CU_K, **options):
    return varlen(q, k, v, cu_q, cu_k, 5, 4, **options)


def test_signature_is_that_of_flash_attn():
    known = {name: x.default for name, x in inspect.signature(varlen).parameters.items()}
    empty = inspect.Parameter.empty
    assert list(known.items()) == [
        ("q", empty),
        ("k", empty),
        ("v", empty),
        ("cu_seqlens_q", empty),
        ("cu_seqlens_k", empty),
        ("max_seqlen_q", empty),
        ("max_seqlen_k", empty),
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("alibi_slopes", None),
        ("deterministic", False),
        ("return_attn_probs", False),
        ("block_table", None),
        ("key_bias", None),  # ours, by name only
    ]


@pytest.mark.parametrize("k_heads", [1, 2, 4])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_values_and_gradients(k_heads, value_dim):
    """Head h of q attends to head h // (H / H_k): against a loop over sequences and heads."""
    q, k, v = tensors(k_heads=k_heads, value_dim=value_dim, dtype=torch.float64)
    out = call(q, k, v, softmax_scale=0.3)
    expected = torch.zeros(9, 4, value_dim, dtype=torch.float64)
    for i in range(3):
        rows, keys = slice(CU_Q[i], CU_Q[i + 1]), slice(CU_K[i], CU_K[i + 1])
        for h in range(4):
            g = h // (4 // k_heads)
            weights = torch.softmax(0.3 * q[rows, h] @ k[keys, g].T, 1)
            expected[rows, h] = weights @ v[keys, g]
    assert torch.allclose(out, expected)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), cotangent, create_graph=True)
    exact = torch.autograd.grad(expected, (q, k, v), cotangent, create_graph=True)
    for x, y in zip(found, exact):
        assert torch.allclose(x, y)
    second = [torch.autograd.grad(sum(x.square().sum() for x in y), q)[0] for y in (found, exact)]
    assert torch.allclose(*second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_returned_statistics(dtype):
    """LSE [H, total_q] float32, +inf without keys; S_dmask empty without dropout."""
    q, k, v = tensors(dtype=dtype)
    out, lse, weights = call(q, k, v, return_attn_probs=True)
    own, own_lse = set_attention(q, k, v, CU_Q, CU_K, return_lse=True)
    assert lse.shape == (4, 9) and lse.dtype == torch.float32 and lse.is_contiguous()
    assert torch.equal(out, own) and torch.equal(lse[:, :3], own_lse[:3].T)
    assert bool((lse[:, 3:] == torch.inf).all()) and not out[3:].any()
    assert weights.shape == (0,) and weights.dtype == dtype
    (dq,) = torch.autograd.grad(lse[:, :3].sum(), q)
    assert dq.isfinite().all() and dq[:3].any() and not dq[3:].any()


def test_dropout_and_its_mask():
    q, k, v = tensors(k_heads=2)
    torch.manual_seed(5)
    out, _, weights = call(q, k, v, dropout_p=0.4, return_attn_probs=True)
    assert weights.shape == (3, 4, 5, 4) and not weights.requires_grad
    torch.manual_seed(5)
    assert torch.equal(out, call(q, k, v, dropout_p=0.4))  # the mask costs no random number
    keep = keep_mask(testing.draw(5, "cpu"), 0, 4, 3, 4, 0.4)
    assert torch.equal(weights[0, :, :3] >= 0, keep) and not keep.all()
    assert torch.allclose(weights[0, :, :3].abs().sum(2), torch.ones(4, 3))
    kept = weights[0, :, :3].clamp(min=0) / 0.6
    expected = torch.einsum("hij,jhd->ihd", kept, v[:4].repeat_interleave(2, 1))
    assert torch.allclose(out[:3], expected, atol=1e-6)
    assert not weights[1:].any() and not weights[0, :, 3:].any()  # without keys or queries


@pytest.mark.parametrize("longest", [0, 1, 10**12, None, torch.tensor(3), "many"])
def test_longest_sequence_is_ignored(longest):
    q, k, v = tensors()
    out = varlen(q, k, v, CU_Q, CU_K, longest, longest)
    assert torch.equal(out, call(q, k, v))


def test_same_boundaries_int64_and_deterministic():
    q, k, v = tensors()
    k, v = (torch.cat([x, x[:2]]) for x in (k, v))
    expected = set_attention(q, k, v, CU_Q)
    for cu in (CU_Q, CU_Q.long()):
        assert torch.equal(varlen(q, k, v, cu, cu, 5, 5, deterministic=True), expected)
    assert torch.equal(varlen(q, k, v, CU_Q, CU_Q.clone(), 5, 5, 0.0, None, False), expected)


def test_nothing_at_all():
    q, k, v = (torch.zeros(0, 2, 8) for _ in range(3))
    cu = torch.tensor([0], dtype=torch.int32)
    out, lse, weights = call(q, k, v, cu, cu, dropout_p=0.5, return_attn_probs=True)
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0) and weights.shape == (0, 2, 0, 0)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"causal": True}, "causal=True"),
        ({"window_size": (3, 0)}, "window_size"),
        ({"window_size": (-1, 0)}, "window_size"),
        ({"window_size": torch.tensor([0, 5])}, "window_size"),
        ({"softcap": 15.0}, "softcap=15.0"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table"),
    ],
)
def test_refused_by_name(option, text):
    with pytest.raises(NotImplementedError, match=text):
        call(*tensors(), **option)


X = torch.randn(9, 4, 8)
BAD = [
    (TypeError, "cu_seqlens_q", {"cu_q": [0, 3, 3, 8]}),
    (TypeError, "cu_seqlens_k", {"cu_k": None}),
    (TypeError, "cu_seqlens_q", {"cu_q": CU_Q.float()}),
    (ValueError, r"cu_seqlens_q\[0\]", {"cu_q": CU_Q + 1}),
    (ValueError, r"cu_seqlens_k.*decrease", {"cu_k": CU_K.flip(0) - CU_K.flip(0)[0]}),
    (ValueError, r"cu_seqlens_k\[-1\]", {"cu_k": CU_K * 2}),
    (ValueError, "cu_seqlens_k.*elements", {"cu_k": CU_K[:3]}),
    (ValueError, "cu_seqlens_q", {"cu_q": CU_Q[None]}),
    (ValueError, "k must have a number of heads that divides", {"k": torch.randn(7, 3, 8)}),
    (ValueError, "v must have a number of heads that divides", {"v": torch.randn(7, 8, 8)}),
    (ValueError, "as many heads, got 4 and 1", {"v": torch.randn(7, 1, 8)}),
    (ValueError, "head", {"k": torch.randn(7, 4, 9)}),
    (ValueError, "rows", {"v": torch.randn(8, 4, 8)}),
    (ValueError, "q must have shape", {"q": X[None]}),
    (TypeError, "dtype", {"q": X.half()}),
    (TypeError, "q must be", {"q": None}),
    (ValueError, "dropout", {"dropout_p": 1.0}),
    (ValueError, "dropout", {"dropout_p": -0.1, "return_attn_probs": True}),
    (TypeError, "dropout", {"dropout_p": "0.1"}),
    (TypeError, "scale", {"softmax_scale": torch.tensor(0.1)}),
    (ValueError, "scale", {"softmax_scale": float("nan")}),
    (ValueError, "window_size", {"window_size": None}),
    (ValueError, "window_size", {"window_size": (-1, -1, -1)}),
    (TypeError, "max_seqlen", {"max_seqlen": 3}),
]


@pytest.mark.parametrize(("error", "text", "change"), BAD)
def test_bad_input(error, text, change):
    q, k, v = tensors()
    with pytest.raises(error, match=text):
        call(**({"q": q, "k": k, "v": v} | change))


# --- flash-attn's own file --------------------------------------------------------------------

MINIATURE = """
import pytest
import torch
from einops import rearrange
from flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_func
from flash_attn.bert_padding import pad_input
from flash_attn.flash_attn_interface import _get_block_size_n, USE_TRITON_ROCM
from flash_attn.layers.rotary import apply_rotary_emb

assert torch.cuda.get_device_capability("cuda") == (8, 0)

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [16, 24, 32])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(4, 8), (8, 99)])
def test_flash_attn_varlen_output(seqlen_q, seqlen_k, d, causal):
    q = torch.randn(seqlen_q, 2, d, device="cuda").to("cuda")
    k = torch.randn(seqlen_k, 2, d, device="cuda")
    cu = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (seqlen_q, seqlen_k)]
    out = flash_attn_varlen_func(q, k, k, *cu, seqlen_q, seqlen_k, causal=causal)
    assert out.shape == q.shape
    if d == 24:
        pytest.fail("on purpose")

def test_flash_attn_kvcache():
    raise AssertionError("not selected")
"""


def harness(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(HARNESS), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_harness_selects_runs_and_reports(tmp_path):
    """On a miniature of their file: the harness must be able to fail, and to say why it cannot."""
    missing = harness(tmp_path)
    assert missing.returncode == 2 and "no checkout of flash-attention" in missing.stderr
    for folder, name, text in (
        ("tests", "test_flash_attn.py", MINIATURE),
        ("flash_attn", "bert_padding.py", "pad_input = unpad_input = None"),
        ("packages", "einops.py", "rearrange = repeat = None"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    path = os.pathsep.join([*sys.path, str(tmp_path / "packages")])
    result = harness(tmp_path, "--longest", 50, PYTHONPATH=path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "ran 3 in a shuffled order from 0 on: 1 failed, 2 passed" in result.stdout
    assert "each value of a parameter in 1 tests or more" in result.stdout
    assert "1 parameter values (causal: refused by name)" in result.stdout
    assert "1 parameter values (longer than 50)" in result.stdout
    chosen = "--widths", "16,32", "--first", 1, "--sample", 2
    result = harness(tmp_path, *chosen, PYTHONPATH=path)
    assert result.returncode == 0 and "2 passed, 2 deselected" in result.stdout
    assert "ran 2 in a shuffled order from 1 on: 2 passed" in result.stdout


def test_flash_attns_own_tests():
    """A sample; the whole file: python tests/tools/flash_attn_suite.py CHECKOUT."""
    checkout = os.environ.get("FLASH_ATTENTION_CHECKOUT")
    if not checkout:
        pytest.skip("FLASH_ATTENTION_CHECKOUT does not name a checkout of flash-attention")
    result = harness(checkout, "--longest", 257, "--widths", "32,59", "--sample", 20)
    if result.returncode == 2:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_forbidden_keys():
    """A key of -inf has weight 0; without any other the output and S_dmask are 0, the LSE +inf."""
    q, k, v = (torch.randn(3, 1, 4) for _ in range(3))
    ptr, call = torch.tensor([0, 2, 3]), varlen
    key_bias = torch.tensor([0.5, -torch.inf, -torch.inf])
    options = {"dropout_p": 0.5, "return_attn_probs": True, "key_bias": key_bias}
    out, lse, weights = call(q, k, v, ptr, ptr, 2, 2, **options)
    assert not out[2].any() and lse[0, 2] == torch.inf
    assert weights.isfinite().all() and not weights[1].any() and not weights[0, :, :, 1].any()
    assert torch.allclose(weights[0, :, :, 0].abs(), torch.ones(1, 2))
