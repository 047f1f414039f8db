"""The configurations by name: ``DATA_BACKBONE_POOLING`` from one table, and a few files.

The rows, the backbones and the poolings are those of Buterez et al. (Commun. Chem. 2023), with
PaiNN and DimeNet besides. What their programs and README say is taken over: Adam with 1e-4, batches
of 128, L1, early stopping after 10 epochs; widths as for QM7b everywhere, because those of the
other sets are in a supplement that was not at hand; OE62 as Chen et al. (Chem. Sci. 2023) have it.
Two things are mended: nothing is padded, and the best model is kept, not the last one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Row:
    """A data set with a target: the first part of a name."""

    dataset: str
    target: str
    split: int
    options: Mapping[str, Any]
    summary: str

    @property
    def orbital(self) -> bool:
        """Whether it is OE62, which has a set-up of its own."""
        return self.dataset == "oe62"


def _rows() -> dict[str, Row]:
    rows = {
        "qm7b": Row("qm7b", "homo_gw", 23887, {}, "QM7b, HOMO (GW)"),
        "qm8": Row("qm8", "e1_cc2", 291305, {}, "QM8, first excitation energy (CC2)"),
        "qm9": Row("qm9", "homo", 844249, {}, "QM9, HOMO"),
        "qmugs": Row("qmugs", "dft_homo", 242566, {}, "QMugs, HOMO (DFT)"),
    }
    for size in (10, 100, 300):
        text = f"QMugs, HOMO (DFT), {size},000 molecules to train on (our sizes)"
        rows[f"qmugs_{size}k"] = dataclasses.replace(
            rows["qmugs"], options={"train": size * 1000}, summary=text
        )
    for molecule in ("benzene", "aspirin", "malonaldehyde", "ethanol", "toluene"):
        level = "CCSD" if molecule == "aspirin" else "CCSD(T)"
        rows[f"md17_{molecule}"] = Row(
            "md17",
            "energy",
            42,
            {"molecule": molecule, "level": "ccsd(t)"},
            f"MD17, {molecule}, energy ({level}), without forces",
        )
    rows["oe62_homo"] = Row("oe62", "homo", 0, {"orbital": "homo"}, "OE62, HOMO")
    # The database has coefficients of the HOMO alone, and the published programs took those.
    rows["oe62_lumo"] = Row(
        "oe62", "lumo", 0, {"orbital": "lumo", "coefficients": "coeff"}, "OE62, LUMO"
    )
    return rows


_DIMENETPP = {
    "hidden_channels": 256,
    "num_blocks": 6,
    "int_emb_size": 64,
    "basis_emb_size": 8,
    "out_emb_channels": 256,
    "latent": 50,
    "cutoff": 5.0,
}
_SCHNET = {"hidden_channels": 256, "num_filters": 256, "num_interactions": 8, "cutoff": 10.0}
_SCHNET_OE62 = {
    "n_atom_basis": 128,
    "n_filters": 128,
    "n_interactions": 6,
    "n_rbf": 64,
    "cutoff": 5.0,
}
_PAINN = {"n_atom_basis": 128, "n_interactions": 3, "n_rbf": 20, "cutoff": 5.0}
_DIMENET = {"hidden_channels": 128, "num_blocks": 6, "latent": 50, "cutoff": 5.0}


@dataclasses.dataclass(frozen=True)
class Net:
    """A backbone: the second part of a name."""

    kind: str  # in zoo.backbones
    options: Mapping[str, Any]
    heading: str
    summary: str
    studied: bool = True


ROWS = _rows()
BACKBONES = {
    "schnet": Net("schnet", _SCHNET, "SchNet", "SchNet of PyG, for OE62 that of SchNetPack"),
    "dimenet++": Net("dimenet++", _DIMENETPP, "DimeNet++", "DimeNet++ of PyG"),
    "painn": Net("painn", _PAINN, "PaiNN", "PaiNN of SchNetPack, its defaults", False),
    "dimenet1": Net("dimenet", _DIMENET, "DimeNet", "DimeNet of PyG (2020), its defaults", False),
}
POOLINGS = {
    "sum": "a sum",
    "mean": "a mean",
    "max": "a maximum",
    "softmax": "an average with softmax weights, channel by channel",
    "weighted": "a weighted average (WA)",
    "owa": "an orbital-weighted average (OWA)",
    "abp": "ABP, 2 blocks",
    "abp3": "ABP, 3 blocks",
}
# Names from before there was a table.
OLD = {
    "md17_schnet_abp": "md17_benzene_schnet_abp",
    "oe62_schnet_abp": "oe62_homo_schnet_abp",
    "oe62_schnet_owa": "oe62_homo_schnet_owa",
    "qm7b_dimenet_abp": "qm7b_dimenet++_abp",
    "qm7b_dimenet_sum": "qm7b_dimenet++_sum",
}


def names() -> list[str]:
    """All names of the table, and of the files after them."""
    table = [
        f"{row}_{backbone}_{pooling}"
        for row, of in ROWS.items()
        for backbone in BACKBONES
        for pooling in POOLINGS
        if of.orbital or pooling != "owa"  # the other sets have no orbital coefficients
    ]
    return table + [path.stem for path in files()]


def files() -> list[Path]:
    """Configurations that are no part of the table: small ones, forces, edge sets."""
    return sorted(FILES.glob("*.yaml"))


def text(name: str) -> str:
    """A configuration as YAML, with what it is in comments at the top; ValueError."""
    import yaml

    path = FILES / f"{name}.yaml"
    if path in files():
        return path.read_text(encoding="utf-8")
    row, backbone, pooling = parts(name)
    title = f"{row.summary}: {BACKBONES[backbone].heading} with {POOLINGS[pooling]}"
    comments = [f"# {line}" for line in (title, *_remarks(row, backbone, pooling))]
    body = yaml.safe_dump(settings(name), sort_keys=False, default_flow_style=None, width=84)
    return "\n".join([*comments, body])


def summary(name: str) -> str:
    """What a configuration is, in a line."""
    return text(name).splitlines()[0].lstrip("# ")


def parts(name: str) -> tuple[Row, str, str]:
    """The row, the backbone and the pooling of a name in the table; ValueError."""
    name = OLD.get(name, name)
    found = re.fullmatch(
        f"({'|'.join(ROWS)})_({'|'.join(map(re.escape, BACKBONES))})_({'|'.join(POOLINGS)})", name
    )
    if found is None or name not in names():
        raise ValueError(f"name must be one that `configs` lists, got {name!r}")
    return ROWS[found[1]], found[2], found[3]


def settings(name: str) -> dict[str, Any]:
    """The options of ``fit`` of a name in the table, those that are not its defaults.

    Raises ValueError for a name that is not in it.
    """
    row, backbone, pooling = parts(name)
    task: dict[str, Any] = {}
    task["backbone"], task["backbone_options"] = _backbone(row, backbone)
    task |= _pooling(row, backbone, pooling)
    task |= {"targets": [row.target], "lr": 1e-4}
    if row.orbital:
        schedule = {"factor": 0.8, "patience": 10, "min_lr": 1e-6}
        task |= {"loss": "mse", "schedule": "plateau", "schedule_options": schedule}
    data: dict[str, Any] = {"dataset": row.dataset, "split": row.split}
    if row.options:
        data["options"] = dict(row.options)
    data["batch_size"] = 40 if row.orbital else 128
    return {
        "task": task,
        "data": data,
        "trainer": {"max_epochs": 1500 if row.orbital else -1},
        "patience": 60 if row.orbital else 10,
    }


def _backbone(row: Row, name: str) -> tuple[str, dict[str, Any]]:
    kind, options = BACKBONES[name].kind, dict(BACKBONES[name].options)
    if row.orbital and name == "schnet":
        kind, options = "schnetpack_schnet", dict(_SCHNET_OE62)
    if row.dataset == "qm7b" and name in ("schnet", "dimenet++"):
        # The programs applied 10 and 5 to positions in bohr; positions are in Å here.
        options["cutoff"] = {10.0: 5.29177, 5.0: 2.645886}[options["cutoff"]]
    return kind, options


def _pooling(row: Row, backbone: str, pooling: str) -> dict[str, Any]:
    """Pooling and head. OE62's networks halve their width from layer to layer, 4 of them."""
    options = _backbone(row, backbone)[1]
    width = options.get("latent") or options.get("n_atom_basis") or options["hidden_channels"]
    halves = [max(1, width >> i) for i in (1, 2, 3)]
    if pooling in ("weighted", "owa"):
        name = "weighted" if pooling == "weighted" else "orbital_weighted"
        # 64, 32 and 16 as published for 128 channels; the same elsewhere.
        found: dict[str, Any] = {"pooling": name, "pooling_options": {"hidden": [64, 32, 16]}}
        return found | ({"coefficient_factor": 0.1} if pooling == "owa" else {})
    if pooling not in ("abp", "abp3"):
        if not row.orbital:
            return {"pooling": pooling}
        # Predictions of atoms are pooled, not vectors.
        return {"pooling": pooling, "head": "atom", "head_layers": halves}
    made: dict[str, Any] = {
        "hidden": 1024,
        "heads": 16,
        "encoder_blocks": 3 if pooling == "abp3" else 2,
    }
    if backbone.startswith("dimenet"):
        made |= {"seeds": 1, "activation": "silu"}
    else:
        made |= {"seeds": 32}
    before = {"atom_layers": [*halves, width]} if row.orbital else {}
    return {"pooling": "abp", "pooling_options": made, **before}


def _remarks(row: Row, backbone: str, pooling: str) -> list[str]:
    """What of it is published and what is not."""
    found = []
    net = BACKBONES[backbone]
    if not net.studied:
        found.append(f"{net.summary}; it is not in the study.")
    elif row.orbital and backbone != "schnet":
        found.append("The study has SchNet alone for OE62; the widths are those for QM7b.")
    elif row.dataset == "qm7b":
        shown = net.options["cutoff"]
        found.append(
            f"Published widths; the cutoff of {shown:g} was applied to bohr, as it is here."
        )
    elif not row.orbital:
        found.append("Published widths for QM7b; those for this set are in an unread supplement.")
    if not row.orbital and pooling in ("mean", "max", "softmax", "weighted"):
        found.append("The programs have sum and ABP for this set; this pooling is a comparison.")
    if row.orbital and pooling.startswith("abp"):
        found.append("Perceptron before the pooling as published, but features are not scaled.")
    if "train" in row.options:
        found.append("The first so many of the published part to train on; sizes are ours.")
    if row.target == "lumo":
        found.append("The coefficients are those of the HOMO, as in the published programs.")
    return found


def matching(patterns: Sequence[str]) -> list[str]:
    """Names that fit all patterns: each a part of the name, or one with * and ? for the whole."""
    wanted = [x if any(c in x for c in "*?[") else f"*{x}*" for x in patterns]
    return [n for n in [*names(), *OLD] if all(fnmatch.fnmatchcase(n, x) for x in wanted)]


def overview() -> str:
    """The table: what the parts of a name can be, and the names that are not in it."""
    lines = [
        f"fit --config NAME: DATA_BACKBONE_POOLING ({len(names()) - len(files())} names) or a name "
        "of those below.",
        "`configs WORD ...` lists the names with all of the words, `configs NAME` prints one.",
    ]
    kinds = {k: net.summary for k, net in BACKBONES.items()}
    others = {path.stem: summary(path.stem) for path in files()}
    for title, entries in (
        ("DATA", {k: row.summary for k, row in ROWS.items()}),
        ("BACKBONE", kinds),
        ("POOLING", POOLINGS | {"owa": f"{POOLINGS['owa']}, of OE62"}),
        ("OTHERS", others),
        ("OLD NAMES", OLD),
    ):
        width = max(len(title), *map(len, entries))
        lines += ["", title, *(f"  {key:{width}}  {value}" for key, value in entries.items())]
    return "\n".join(lines)


def listing(patterns: Sequence[str]) -> str:
    """One configuration as YAML, or the names that match, a line each; ValueError for none."""
    if not patterns:
        return overview()
    if len(patterns) == 1 and patterns[0] in [*names(), *OLD]:
        return text(patterns[0]).rstrip()
    found = matching(patterns)
    if not found:
        raise ValueError(f"no configuration matches {' '.join(patterns)}; `configs` lists them")
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {summary(name)}" for name in found)
