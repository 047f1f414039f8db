"""Names for what kernels and their helpers are given together.

Kernels take the tuples of ``attnpool_kernels.operands`` with a ``Rows`` or a ``Batched`` in place
of each tensor that is read, and a bare pointer in place of each contiguous one that is written. An
absent tensor is None, and whatever would read it is not compiled. Triton specialises the members of
a tuple like arguments of their own.

A variable that holds one of the tuples of constants (``Width``, ``Widths``, ``Tile``) has to be
annotated with tl.constexpr: a plain assignment would turn its members into values of the kernel.
"""

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A tensor [rows, heads, width] or [rows, heads]."""

    data: Any
    strides: Any


class Batched(NamedTuple):
    """A tensor shaped as out or lse, [B, S, heads, ...] or packed: step is the stride of B, or 0.

    ``primitives.of_molecule`` gives the rows of a molecule.
    """

    data: Any
    step: Any
    strides: Any


class Statistics(NamedTuple):
    """Contiguous tensors [rows, heads] of row statistics, from one launch to the next; some None.

    total is Σ P, whose inverse is norm.
    """

    delta: Any
    norm: Any = None
    y: Any = None
    total: Any = None
    t: Any = None


class Outputs(NamedTuple):
    """Of the parts of a molecule's keys: their outputs and LSE, both None or scratch tensors.

    With a total the LSE is in two terms, the largest logit and Σ exp beside it: where a key bias
    is the least finite number, their sum would keep nothing of the second.
    """

    out: Any
    lse: Any
    total: Any = None


class Parts(NamedTuple):
    """What is found about the parts of a molecule's keys, before and after it is merged."""

    gdout: Any
    rows: Statistics
    whole: Statistics


class Place(NamedTuple):
    """Where a block is in a packed tensor: rows row + offsets of a head, as far as mask goes."""

    row: Any
    offsets: Any
    mask: Any
    head: Any


class Molecule(NamedTuple):
    """Keys and pairs of a molecule: first row and number of each."""

    index: Any
    k_row: Any
    keys: Any
    pair: Any
    pairs: Any


class Dual(NamedTuple):
    """A value and its tangent, which is None where it is zero."""

    value: Any
    tangent: Any


class Factors(NamedTuple):
    """Scale of the logits, 1 / (1 - dropout), and the threshold of the keep mask."""

    c: Any
    r: Any
    threshold: Any


class Width(NamedTuple):
    """Of the head dimension, and of the tiles that hold it."""

    used: Any
    padded: Any


class Widths(NamedTuple):
    """Of q and k, and of v."""

    qk: Width
    v: Width


class Tile(NamedTuple):
    """Queries, keys, columns of a slice and precision of the products; see tile_table."""

    m: Any
    n: Any
    slice: Any
    precision: Any
