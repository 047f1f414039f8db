r"""Attention-based pooling (ABP), also with the weights and the numbers of the original programs.

::

    ABP(x) = mean over the seeds of Linear(SAB(PMA(SAB^L(x))))

The original programs pad every molecule with zero rows and mask nothing: a padded row is a key and,
from the second layer on, no longer zero. All m padded rows of a molecule are equal in every layer,
so one *phantom row* whose logits carry log m gives the same numbers without any padding. That is
done where it is asked for, for models that were trained so; the default has no such rows.

Source: Buterez, Janet, Kiddle, Oglic, Liò, Communications Chemistry 2023,
https://doi.org/10.1038/s42004-023-01045-7, and its programs (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ragged import Ragged
from . import scripted
from .arguments import check_rows, covered, one_of, positive
from .blocks import SetTransformer, decoded, reduced

BATCH_MAX = "batch_max"
VARIANTS = {"schnet": (32, "relu"), "dimenet++": (1, "silu"), "oe62": (32, "relu")}


class AttentionPooling(SetTransformer):
    """Attention-based pooling: [B, C_out] from x [N, C] and the boundaries of the molecules.

    Args:
        in_features: C.
        hidden: D, width of the blocks; a multiple of ``heads``.
        out_features: C_out, default C; width of the linear head.
        heads, seeds, encoder_blocks, decoder_blocks, points, options: see ``SetTransformer``.
        reduce: of the seeds: "mean", or "concat" for [B, S·C_out].
        phantom: None, the correct model: a molecule's result depends on its own atoms only. An
            int: as if every molecule was padded with unmasked zero rows to that many (a larger
            molecule raises ValueError); "batch_max": to the largest of the batch, so that a result
            depends on the other molecules. Both read the boundaries on the host.

    Defaults are the architecture of the original. A molecule without atoms gives what its seeds
    give without any attention.

    Examples:
        >>> pool = AttentionPooling(8, hidden=16, heads=4, seeds=2)
        >>> pool(torch.randn(8, 8), Ragged.from_counts([5, 3])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int = 512,
        out_features: int | None = None,
        *,
        heads: int = 16,
        seeds: int = 32,
        encoder_blocks: int = 2,
        decoder_blocks: int = 1,
        points: int | None = None,
        reduce: str = "mean",
        phantom: int | str | None = None,
        **options,
    ) -> None:
        super().__init__(
            in_features,
            hidden,
            in_features if out_features is None else out_features,
            heads=heads,
            seeds=seeds,
            encoder_blocks=encoder_blocks,
            decoder_blocks=decoder_blocks,
            points=points,
            reduce=one_of("reduce", reduce, ("mean", "concat")),
            **options,
        )
        if isinstance(phantom, str):
            one_of("phantom", phantom, (BATCH_MAX,))
        elif phantom is not None:
            positive("phantom", phantom)
        if phantom is not None and points is not None:
            raise ValueError("phantom must be None with induced points: the original has none")
        self.phantom = phantom
        self.heads, self.seeds = heads, seeds

    @classmethod
    def original(
        cls,
        variant: str,
        in_features: int,
        hidden: int = 512,
        out_features: int | None = None,
        *,
        heads: int = 16,
        encoder_blocks: int = 2,
        phantom: int | str | None = None,
    ) -> AttentionPooling:
        """The pooling of one of the original programs.

        Args:
            variant: "schnet" (32 seeds, relu), "dimenet++" (1 seed, swish) or "oe62" (32, relu).
            phantom: what the programs did, explicitly: "schnet" and "dimenet++" padded to a number
                that the data set fixes (QM7 23, QM8 26, QM9 29, QMugs 228), "oe62" to
                "batch_max". None is the correct model with the same weights.
        """
        one_of("variant", variant, tuple(VARIANTS))
        seeds, activation = VARIANTS[variant]
        return cls(
            in_features,
            hidden,
            out_features,
            heads=heads,
            seeds=seeds,
            activation=activation,
            encoder_blocks=encoder_blocks,
            phantom=phantom,
        )

    def load_original(self, state: Mapping[str, Tensor]) -> None:
        """Loads the pooling of a checkpoint of the original programs, strictly.

        Takes the state dict of the pooling, or of the whole model, where its keys start with
        "net.st." (SchNet), "st." (DimeNet++) or "output_modules.0.atom_pool." (OE62).
        Raises KeyError where it holds no such pooling, RuntimeError where its shapes differ.
        """
        self.load_state_dict(converted(state))

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, C_out] from x [N, C] and the boundaries [B + 1]."""
        if self.phantom is None:
            return super().forward(x, ptr)
        check_rows("x", x, self.in_features)
        x, ragged = covered(x, ptr)
        ragged = ragged.to(x.device)
        weights = self._missing(ragged).log()
        x, ragged = with_phantoms(x, ragged)
        key_bias = phantom_bias(weights, ragged, x)
        for block in self.encoders:
            x = block(x, ragged, key_bias=key_bias)
        x = self.pma(x, ragged, key_bias=key_bias)
        return reduced(decoded(x, self.decoders), self.head, self.reduce)

    def __prepare_scriptable__(self) -> AttentionPooling:
        if self.phantom is not None:
            raise NotImplementedError(
                f"phantom must be None for TorchScript, got {self.phantom!r}; use torch.export"
            )
        return scripted.prepared(self, AttentionPooling, scripted.set_transformer)

    def weights(
        self, x: Tensor, ptr: Tensor | Ragged, top: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See ``PMA.weights``. Raises ValueError with phantom rows, which have weights, too."""
        if self.phantom is not None:
            raise ValueError(f"phantom must be None for weights, got {self.phantom!r}")
        return super().weights(x, ptr, top)

    def _missing(self, ragged: Ragged) -> Tensor:
        """Number of padded rows [B] of each molecule, float64."""
        counts = ragged.counts().double()
        if not isinstance(self.phantom, int):
            return counts.amax() - counts if counts.shape[0] else counts
        missing = self.phantom - counts
        if bool((missing < 0).any()):
            i = int((missing < 0).nonzero()[0])
            raise ValueError(
                f"phantom must be at least the largest molecule, got {self.phantom} for molecule "
                f"{i} of {int(counts[i])} atoms"
            )
        return missing

    def extra_repr(self) -> str:
        return f"reduce={self.reduce!r}, phantom={self.phantom!r}"


def with_phantoms(x: Tensor, ragged: Ragged) -> tuple[Tensor, Ragged]:
    """x [N + B, C] with a row of zeros at the end of each molecule, and its boundaries."""
    rows, molecules = x.shape[0], ragged.molecules
    place = torch.arange(rows, device=x.device) + ragged.batch(rows)
    longer = x.new_zeros(rows + molecules, x.shape[1]).index_copy(0, place, x)
    shift = torch.arange(molecules + 1, device=x.device, dtype=ragged.ptr.dtype)
    return longer, Ragged(ragged.ptr + shift)


def phantom_bias(weights: Tensor, ragged: Ragged, x: Tensor) -> Tensor:
    """[N + B] with ``weights`` [B] on the last row of each molecule, else 0.

    float32 (float64 for float64), exact in half precision, where log m in an extra channel of the
    keys would be rounded. log 0 = -inf forbids the row where nothing is padded.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
    return bias.index_copy(0, ragged.ptr[1:].long() - 1, weights.to(dtype))


_FIRST = "enc.0.mab.fc_q.weight"


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ``AttentionPooling`` from one of the original programs.

    Raises KeyError where the state dict holds no such pooling.
    """
    prefix = next((key[: -len(_FIRST)] for key in state if key.endswith(_FIRST)), None)
    if prefix is None:
        raise KeyError(f"state must hold a key that ends with {_FIRST!r}, as the original's do")
    old = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
    blocks = sum(key.endswith(".mab.fc_q.weight") and key.startswith("enc.") for key in old)
    names = {f"enc.{i}.mab": f"encoders.{i}.mab" for i in range(blocks)}
    names |= {"dec.0.mab": "pma.mab", "dec.1.mab": "decoders.0.mab"}
    new = {"pma.seed": old.pop("dec.0.S")}
    for before, after in names.items():
        for kind in ("weight", "bias"):
            stack = [old.pop(f"{before}.fc_{part}.{kind}") for part in "qkv"]
            new[f"{after}.attn.in_proj_{kind}"] = torch.cat(stack)
            new[f"{after}.lin.{kind}"] = old.pop(f"{before}.fc_o.{kind}")
    for kind in ("weight", "bias"):
        new[f"head.{kind}"] = old.pop(f"dec.2.{kind}")
    if old:
        raise KeyError(f"state must hold nothing else under {prefix!r}, got {', '.join(old)}")
    return new
