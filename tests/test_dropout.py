"""Philox against published numbers, and the statistics of the mask."""

import pytest
import torch

from attnpool_kernels import seed_pool, set_attention
from attnpool_kernels.dropout import keep_mask, philox, threshold

# Known answers of Philox4x32-10 from the Random123 distribution: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    found = philox(tuple(torch.tensor(c) for c in counter), torch.tensor(key))
    assert tuple(found.tolist()) == words


def test_keep_rate_and_independence():
    mask = keep_mask(torch.tensor([123]), 0, 8, 64, 64, 0.3).double()
    assert abs(mask.mean() - 0.7) < 0.01
    other = keep_mask(torch.tensor([124]), 0, 8, 64, 64, 0.3).double()
    assert abs(((mask - 0.7) * (other - 0.7)).mean()) < 0.01
    for axis in range(3):  # neighbours are independent
        a, b = mask.narrow(axis, 0, 7), mask.narrow(axis, 1, 7)
        assert abs(((a - 0.7) * (b - 0.7)).mean()) < 0.02


def test_mask_of_fewer_keys_is_a_part():
    whole = keep_mask(torch.tensor([5]), 3, 2, 9, 37, 0.5)
    assert torch.equal(keep_mask(torch.tensor([5]), 3, 2, 4, 10, 0.5), whole[:, :4, :10])


def test_threshold_ends():
    assert threshold(0.0) == 0 and threshold(0.5) == 2**31 and threshold(1 - 2**-40) == 2**32 - 1


def test_operator_uses_this_mask(native):
    """v = unit vectors and equal logits: the output shows the mask itself."""
    n, p = 16, 0.4
    ptr = torch.tensor([0, n, 2 * n])
    v = torch.eye(n).repeat(2, 1)[:, None].expand(2 * n, 3, n)
    zero = torch.zeros(2 * n, 3, 4)
    torch.manual_seed(7)
    out = set_attention(zero, zero, v, ptr, dropout=p, backend=native)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (1,))
    for i in range(2):
        expected = keep_mask(seed, i, 3, n, n, p).permute(1, 0, 2) / (n * (1 - p))
        assert torch.allclose(out[i * n : (i + 1) * n], expected, atol=1e-6)
    torch.manual_seed(7)
    pooled = seed_pool(zero[:5], zero, v, ptr, dropout=p, backend=native)
    expected = keep_mask(seed, 1, 3, 5, n, p).permute(1, 0, 2) / (n * (1 - p))
    assert torch.allclose(pooled[1], expected, atol=1e-6)


def test_seed_decides(native):
    x, ptr = torch.randn(30, 2, 8), torch.tensor([0, 30])
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(set_attention(x, x, x, ptr, dropout=0.5, backend=native))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    plain = set_attention(x, x, x, ptr, backend=native)
    mean = torch.stack(
        [set_attention(x, x, x, ptr, dropout=0.2, backend=native) for _ in range(300)]
    ).mean(0)
    assert (mean - plain).abs().max() < 0.2
