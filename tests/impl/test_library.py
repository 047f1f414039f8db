"""What the compiled CUDA library is told ahead of a call."""

from types import SimpleNamespace

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.impl import library


def on_a_gpu(x):
    return SimpleNamespace(is_cuda=True, shape=x.shape)


@pytest.fixture
def told(monkeypatch):
    """The numbers that would reach the library, with its calls between them."""
    found = []
    monkeypatch.setattr(torch.ops.attnpool, "_expect", found.append, raising=False)
    return found


def operator(told, error=None, namespace=library.OPERATORS):
    class Operator:
        def __call__(self, *flat):
            told.append("call")
            if error is not None:
                raise error
            return "result"

    found = Operator()
    found.namespace = namespace
    return found


def flat(q, q_ptr, k_ptr):
    return on_a_gpu(q), *[None] * 4, q_ptr, k_ptr, None, None, 1.0, 0.0


def test_the_longest_molecule_goes_ahead_of_a_call(told):
    sets, few = Ragged.from_counts([3, 18]), Ragged.from_counts([40, 2])
    q = torch.zeros(21, 1, 8)
    arguments = flat(q, sets.ptr, sets.ptr)
    assert library.call(operator(told), arguments) == "result" and told == ["call"]
    assert sets.sizes and few.sizes
    told.clear()
    library.call(operator(told), arguments)
    assert told == [18, "call", 0]
    for q_ptr, k_ptr, seeds, longest in ((sets.ptr, few.ptr, 42, 40), (None, sets.ptr, 33, 33)):
        told.clear()
        library.call(operator(told), flat(torch.zeros(seeds, 1, 8), q_ptr, k_ptr))
        assert told == [longest, "call", 0]


def test_what_was_said_of_a_refused_call_is_taken_back(told):
    sets = Ragged.from_counts([3, 18])
    assert sets.sizes
    with pytest.raises(RuntimeError, match="wrong"):
        library.call(
            operator(told, RuntimeError("wrong")), flat(torch.zeros(21, 1, 8), sets.ptr, sets.ptr)
        )
    assert told == [18, "call", 0]


def test_others_are_told_nothing(told):
    sets = Ragged.from_counts([3, 18])
    assert sets.sizes
    q = torch.zeros(21, 1, 8)
    library.call(operator(told, namespace="attnpool_triton"), flat(q, sets.ptr, sets.ptr))
    library.call(operator(told), (q, *flat(q, sets.ptr, sets.ptr)[1:]))
    with torch._subclasses.FakeTensorMode():
        library.call(operator(told), flat(q, sets.ptr, sets.ptr))
    sets.ptr.add_(0)
    library.call(operator(told), flat(q, sets.ptr, sets.ptr))
    assert told == ["call"] * 4
