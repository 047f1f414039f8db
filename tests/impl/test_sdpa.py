"""torch's SDPA as a backend: what is particular to it."""

import torch

from attnpool_kernels import set_attention


def test_sdpa_does_not_round_a_float32_bias():
    """To the type of half-precision rows; nor the sum of two, to float32 for float64 rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 1, 4, generator=generator)
    ptr = torch.tensor([0, 3])
    for options in (
        {"key_bias": torch.tensor([100.0, 100.3, 100.1])},
        {"key_bias": torch.full((3,), 1e5)},
        {"key_bias": torch.full((3,), -1e5)},
        {"bias": torch.tensor([[100.0, 100.3, 100.1] * 3]).T},
    ):
        for dtype in (torch.bfloat16, torch.float16):
            x = rows.to(dtype)
            found = set_attention(x, x, x, ptr, backend="sdpa", **options)
            wanted = set_attention(x, x, x, ptr, backend="reference", **options)
            assert torch.allclose(found, wanted, atol=2e-2)
    x = rows.double()
    pairs = torch.randn(9, 1, generator=generator)
    both = {"key_bias": torch.tensor([1.25e8 + 8, 1.25e8, 1.25e8]), "bias": pairs}
    found, wanted = (set_attention(x, x, x, ptr, backend=y, **both) for y in ("sdpa", "reference"))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-7)
