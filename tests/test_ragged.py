"""Boundaries from every spelling, and what is wrong with them."""

import copy
import pickle

import pytest
import torch

from attnpool_kernels import Ragged, ragged


def test_all_spellings_agree():
    ptr = torch.tensor([0, 3, 3, 8])
    for made in (
        Ragged.from_ptr(ptr),
        Ragged.from_counts([3, 0, 5]),
        Ragged.from_counts(torch.tensor([3, 0, 5])),
        Ragged.from_batch(torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])),
    ):
        assert torch.equal(made.ptr, ptr)
        assert len(made) == 3 and made.counts().tolist() == [3, 0, 5]
    assert Ragged.from_batch(torch.tensor([0, 0]), 4).ptr.tolist() == [0, 2, 2, 2, 2]
    assert Ragged.from_batch(torch.tensor([], dtype=torch.int64)).ptr.tolist() == [0]
    assert Ragged.from_counts([]).ptr.tolist() == [0]
    assert Ragged.from_counts([0, 0, 2]).ptr.tolist() == [0, 0, 0, 2]
    with torch._subclasses.FakeTensorMode():  # contents that nobody can read
        assert Ragged.from_counts(torch.tensor([1, 2])).ptr.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_type_is_kept(dtype):
    assert Ragged.from_counts(torch.tensor([1, 2], dtype=dtype)).ptr.dtype == dtype
    assert Ragged.from_batch(torch.tensor([0, 1], dtype=dtype)).ptr.dtype == dtype


def test_pairs_and_batch():
    own = Ragged.from_counts([3, 0, 5])
    assert own.pairs().tolist() == [0, 9, 9, 34]
    assert own.pairs(Ragged.from_counts([1, 4, 2])).tolist() == [0, 3, 3, 13]
    assert own.batch().tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert own.batch(10).tolist()[8:] == [3, 3]
    with pytest.raises(ValueError, match="as many molecules"):
        own.pairs(Ragged.from_counts([1]))


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: Ragged.from_batch(torch.tensor([0, 2, 1])), ValueError, "sorted"),
        (lambda: Ragged.from_batch(torch.tensor([-1, 0])), ValueError, "negative"),
        (lambda: Ragged.from_batch(torch.tensor([0, 3]), 3), ValueError, "num_molecules = 3"),
        (lambda: Ragged.from_batch(torch.tensor([0.0])), TypeError, "float32"),
        (lambda: Ragged.from_batch([0, 1]), TypeError, "list"),
        (lambda: Ragged.from_batch(torch.tensor([[0]])), ValueError, "[N]"),
        (lambda: Ragged.from_batch(torch.tensor([0]), 1.5), TypeError, "num_molecules"),
        (lambda: Ragged.from_counts([1.5, 2]), TypeError, "counts"),
        (lambda: Ragged.from_counts([True]), TypeError, "counts"),
        (lambda: Ragged.from_counts("abc"), TypeError, "counts"),
        (lambda: Ragged.from_counts([2**62, 2**62]), ValueError, "int64"),
        (lambda: Ragged.from_counts([2, 3]).batch(3), ValueError, "at least ptr[-1] = 5"),
        (lambda: Ragged.from_counts([2, 3]).batch(7.5), TypeError, "rows"),
        (lambda: Ragged.from_counts([2, 3]).pairs(torch.tensor([0, 1])), TypeError, "keys"),
        (lambda: Ragged.from_counts([1, -1]), ValueError, "counts[1] = -1"),
        (lambda: Ragged.from_counts(torch.tensor([1.0])), TypeError, "counts"),
        (lambda: Ragged.from_counts(torch.tensor([[1]])), ValueError, "[B]"),
        (lambda: Ragged.from_ptr(torch.tensor([0, 2, 1])), ValueError, "decrease"),
        (lambda: Ragged.from_ptr(torch.tensor([1, 2])), ValueError, "ptr[0]"),
        (lambda: Ragged.from_ptr([0, 2]), TypeError, "list"),
        (lambda: ragged.check(torch.tensor([0, 9]), 8), ValueError, "8"),
        (lambda: ragged.check(Ragged.from_counts([9]), 8), ValueError, "8"),
        (lambda: ragged.check(torch.tensor([0, 9]), None), TypeError, "rows"),
        (lambda: ragged.check(torch.tensor([0, 9]), 2**70), ValueError, "rows"),
        (lambda: ragged.check(torch.tensor([0, 9], device="meta"), 9), ValueError, "meta"),
        (lambda: Ragged.from_batch(torch.tensor([0]), 2**70), ValueError, "num_molecules"),
        (lambda: Ragged.from_batch(torch.tensor([0]).int(), 2**31), ValueError, "num_molecules"),
    ],
)
def test_errors(make, error, word):
    with pytest.raises(error) as caught:
        make()
    assert word in str(caught.value)


def test_check_accepts_good_boundaries():
    ragged.check(torch.tensor([0, 3, 8]), 8)
    ragged.check(torch.tensor([0], dtype=torch.int32), 0)


def test_sizes_are_remembered_for_boundaries_that_moved():
    own = Ragged.from_counts([3, 0, 5])
    assert own.sizes == ragged.Sizes(0, 5, 8) == ragged.sizes_of(own.ptr)
    assert Ragged.from_counts([]).sizes == ragged.Sizes(0, 0, 0)
    moved = own.to("meta")
    assert moved.sizes == own.sizes and ragged.sizes_of(moved.ptr) == own.sizes
    assert ragged.sizes_of(own.ptr.clone()) is None and Ragged(moved.ptr).sizes == own.sizes
    assert Ragged(torch.empty(4, dtype=torch.int64, device="meta")).sizes is None


def test_a_change_in_place_drops_the_sizes():
    own = Ragged.from_counts([3, 0, 5])
    assert own.sizes is not None
    own.ptr[-1] = 4
    assert ragged.sizes_of(own.ptr) is None and own.sizes == ragged.Sizes(0, 3, 4)
    view = own.ptr.detach()
    view += 0  # of a view, too
    assert ragged.sizes_of(own.ptr) is None


def test_sizes_are_forgotten_with_their_boundaries():
    before = len(ragged._known)
    own = Ragged.from_counts([3, 5])
    assert own.sizes and len(ragged._known) == before + 1
    del own
    assert len(ragged._known) == before
    with torch.inference_mode():
        ptr = torch.tensor([0, 2])
    ragged.remember(ptr, ragged.Sizes(2, 2, 2))
    assert ragged.sizes_of(ptr) is None


def test_sizes_are_not_saved_with_boundaries():
    own = Ragged.from_counts([3, 5])
    assert own.sizes and not own.ptr.__dict__
    assert ragged.sizes_of(copy.deepcopy(own.ptr)) is None


def test_copies_and_text():
    own = Ragged.from_counts([3, 5])
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), own.to("cpu")):
        assert torch.equal(other.ptr, own.ptr) and other.last == 8
    assert repr(own) == "Ragged(2 molecules, 8 rows, torch.int64, cpu)"
