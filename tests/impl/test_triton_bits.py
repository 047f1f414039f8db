"""The other half of the interpreted suite, in a file of its own: pytest-xdist gives a worker whole
files, and each half takes minutes."""

from test_triton import interpreted, needs_triton


@needs_triton
def test_interpreted_bits():
    interpreted("test_triton_interpreted_bits.py")
