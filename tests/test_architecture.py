"""The arrows of the house: who may import whom, and how large a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attnpool_kernels"
OPTIONAL = {"triton", "xformers", "flash_attn", "torch_geometric", "schnetpack", "ase", "numpy"}
SOURCES = sorted(PACKAGE.rglob("*.py"))
# module -> modules of the package that it may import at its top level
ALLOWED = {
    "tracing": set(),
    "operands": set(),
    "dropout": set(),
    "ragged": {"tracing"},
    "problem": {"operands"},
    "backends": {"operands", "problem", "ragged", "tracing", "dropout"},
    "dispatch": {"backends", "problem"},
    "ops": {"backends", "operands"},
    "autograd": {"ops", "backends", "operands", "problem", "ragged", "tracing"},
    "functional": {
        "autograd", "dispatch", "dropout", "operands", "problem", "ragged", "tracing",
    },
    "testing": {"functional", "ragged", "dropout", "backends", "operands"},
    "compat": {"functional", "ragged", "dropout", "tracing"},
}  # fmt: skip
SHARED = {"library", "needs", "packing"}  # what backends have in common


def imports(path, everywhere=False):
    """Absolute names of what a file imports at its top level (or anywhere)."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).with_suffix("").parts
            if node.level:
                base = base[: len(base) - node.level]
                prefix = ".".join([*base, node.module] if node.module else base)
            else:
                prefix = node.module
            names |= {f"{prefix}.{alias.name}" for alias in node.names} | {prefix}
    return names


def parts(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("attnpool_kernels.")}


@pytest.mark.parametrize("module", ALLOWED)
def test_arrows(module):
    files = {p.stem for p in PACKAGE.glob("*.py")} | {"backends", "nn", "zoo", "testing"}
    for path in (PACKAGE / f"{module}.py", *(PACKAGE / module).rglob("*.py")):
        if path.exists():
            assert parts(path) & files <= ALLOWED[module] | {module}


def test_backends_know_neither_models_nor_each_other():
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backends").parts[0].removesuffix(".py")
        for name in imports(path, everywhere=True):
            assert not name.startswith(("attnpool_kernels.nn", "attnpool_kernels.zoo")), path
            if name.startswith("attnpool_kernels.backends."):
                assert name.split(".")[2] in {own, *SHARED}, f"{path} imports {name}"


def test_nn_needs_the_operator_only():
    for path in (PACKAGE / "nn").rglob("*.py"):
        for name in imports(path, everywhere=True):
            assert not name.startswith(("attnpool_kernels.zoo", "attnpool_kernels.backends")), path


def test_optional_packages_are_imported_inside_functions():
    for path in SOURCES:
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith(("zoo/", "backends/triton/")):
            continue  # loaded on demand as a whole
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & OPTIONAL, path


def test_torch_stays_out_of_the_kernels():
    for path in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]:
        if path.name != "bridge.h":
            assert "<torch/" not in path.read_text(), path


def test_no_drawers_and_no_long_files():
    code = [*SOURCES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    code += [p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix != ".json"]
    for path in code:
        assert path.stem not in {"utils", "common", "core", "types", "config", "errors", "helpers"}
        assert len(path.read_text().splitlines()) <= 520, path
