"""The arrows of the house: who may import whom, and how large a file may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attnpool_kernels"
OPTIONAL = {"triton", "xformers", "flash_attn", "torch_geometric", "schnetpack", "ase", "numpy"}
OPTIONAL |= {"metatrain", "metatomic"}
ON_DEMAND = ("zoo/", "impl/triton/", "integrations/pet.py")  # loaded as a whole
SOURCES = sorted(PACKAGE.rglob("*.py"))
# module -> modules of the package that it may import at its top level
ALLOWED = {
    "tracing": set(),
    "operands": set(),
    "dropout": set(),
    "ragged": {"tracing"},
    "problem": {"operands", "ragged", "tracing"},
    "impl": {"operands", "problem", "ragged", "tracing", "dropout"},
    "dispatch": {"impl", "problem"},
    "ops": {"impl", "operands"},
    "autograd": {"ops", "impl", "operands", "problem", "ragged", "tracing"},
    "functional": {
        "autograd",
        "dispatch",
        "dropout",
        "operands",
        "problem",
        "ragged",
        "tracing",
    },
    "testing": {"functional", "ragged", "dropout", "impl", "operands"},
    "compat": {"functional", "ragged", "dropout", "tracing"},
    "layouts": {"functional", "ragged", "tracing"},
    "weights": {"functional", "operands", "ragged"},
    "integrations": {"functional", "ragged"},
}
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}  # its public methods
FOREIGN = {"flash_attn_varlen_func"}  # signatures of other libraries
SCRIPTED = {"torchscript.py", "scripted.py"}  # TorchScript has no keyword-only defaults
SHARED = {"library", "needs", "packing"}  # what backends have in common
# part of the benchmarks -> parts that it may import, at the top or inside functions
BENCHMARKS = {
    "workloads": set(),
    "contenders": {"workloads"},
    "measuring": {"workloads", "contenders"},
    "reporting": {"measuring"},
    "studies": {"workloads", "contenders", "measuring", "reporting"},
    "run": {"workloads", "contenders", "measuring", "reporting", "studies"},
    "report": {"measuring", "reporting"},
    "test_regression": {"workloads", "contenders", "measuring"},
}


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
    files = {p.stem for p in PACKAGE.glob("*.py")} | {
        "impl",
        "nn",
        "zoo",
        "testing",
        "integrations",
    }
    for path in (PACKAGE / f"{module}.py", *(PACKAGE / module).rglob("*.py")):
        if path.exists():
            assert parts(path) & files <= ALLOWED[module] | {module}


def test_backends_know_neither_models_nor_each_other():
    for path in (PACKAGE / "impl").rglob("*.py"):
        own = path.relative_to(PACKAGE / "impl").parts[0].removesuffix(".py")
        for name in imports(path, everywhere=True):
            assert not name.startswith(("attnpool_kernels.nn", "attnpool_kernels.zoo")), path
            if name.startswith("attnpool_kernels.impl."):
                assert name.split(".")[2] in {own, *SHARED}, f"{path} imports {name}"


def test_nn_needs_the_operator_only():
    for path in (PACKAGE / "nn").rglob("*.py"):
        for name in imports(path, everywhere=True):
            assert not name.startswith(("attnpool_kernels.zoo", "attnpool_kernels.impl")), path


def test_optional_packages_are_imported_inside_functions():
    for path in SOURCES:
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith(ON_DEMAND):
            continue
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & OPTIONAL, path


def dotted(path):
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def arrows():
    """Module of the benchmarks -> those that it imports, at the top or inside functions.

    Python runs the packages around a module before it, so they count as imported, too.
    """
    paths = {dotted(path): path for path in (ROOT / "benchmarks").rglob("*.py")}
    found = {}
    for module, path in paths.items():
        targets = set()
        for name in imports(path, everywhere=True):
            names = name.split(".")
            targets |= {".".join(names[:end]) for end in range(1, len(names) + 1)}
        found[module] = targets & paths.keys() - {module}
    return found


def circle(graph):
    """Modules that import each other in a ring; [] where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_benchmarks_have_no_circle():
    assert circle(arrows()) == []


def test_a_planted_circle_is_found():
    graph = arrows()
    inside, outside = "benchmarks.measuring.base", "benchmarks.measuring.sweep"
    assert "benchmarks.contenders.registry" in graph[inside]  # imported inside a function
    graph["benchmarks.workloads.workload"] = {outside}
    assert {"benchmarks.workloads.workload", outside} <= set(circle(graph))


def test_arrows_of_the_benchmarks():
    graph = arrows()
    parts = {module: (module.split(".")[1:] or [""])[0] for module in graph}
    assert set(parts.values()) == {*BENCHMARKS, ""}
    for module, targets in graph.items():
        used = {parts[target] for target in targets} - {parts[module], ""}
        assert used <= BENCHMARKS.get(parts[module], set()), module


def test_torch_stays_out_of_the_kernels():
    for path in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]:
        if path.name != "bridge.h":
            assert "<torch/" not in path.read_text(), path


def test_no_catch_all_modules_and_no_long_files():
    code = [*SOURCES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    code += [p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix != ".json"]
    for path in code:
        assert path.stem not in {"utils", "common", "core", "types", "config", "errors", "helpers"}
        assert len(path.read_text().splitlines()) <= 520, path


def test_private_names_stay_at_home():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        modules = set()
        for node in ast.walk(tree):
            own = isinstance(node, ast.ImportFrom) and (
                node.level or (node.module or "").startswith("attnpool_kernels")
            )
            for alias in node.names if own else ():
                assert not alias.name.startswith("_"), f"{path} imports {alias.name}"
                modules.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and node.attr not in NAMEDTUPLE
                assert not (private and node.value.id in modules), f"{path} uses {node.attr}"


def test_no_long_lists_of_positional_arguments():
    """Tensors travel in the tuples of ``operands``; the kernels of Triton are told apart."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                jitted = any("jit" in ast.unparse(x) for x in node.decorator_list)
                most = 28 if jitted else 11 if path.name in SCRIPTED else 8
                names = [x.arg for x in (*node.args.posonlyargs, *node.args.args)]
                count = len([x for x in names if x not in ("self", "cls", "ctx")])
                assert count <= most or node.name in FOREIGN, f"{path}: {node.name} takes {count}"
