"""The two hooks with which the site is built; whether it builds is for `make docs`."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def hook(name, package):
    pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCSTRING = """A product, D**-0.5 of it.

For each row::

    y = x * x
    z = ``y``

Then ``a**b`` stays code.

Args:
    x: a number::

        x * x

    y: S*(x).

Examples:
    >>> 2 * 3
    6
"""
MARKDOWN = """A product, D\\*\\*-0.5 of it.

For each row:

```text
y = x * x
z = ``y``
```

Then ``a**b`` stays code.

Args:
    x: a number:

    ```text
    x * x
    ```

    y: S\\*(x).

Examples:
    >>> 2 * 3
    6"""


def test_docstrings_become_markdown():
    made = hook("docstrings", "griffe").markdown(DOCSTRING)
    assert [x for x in made.split("\n") if x.strip()] == [x for x in MARKDOWN.split("\n") if x]


def test_links_to_files_of_the_repository():
    sources = hook("sources", "mkdocs")
    assert sources.outside("tutorials/esa.md", "../../examples/pyg_gin.py") == "examples/pyg_gin.py"
    assert sources.outside("tutorials/esa.md", "../benchmarks.md") is None
    assert sources.place("csrc/cuda/README.md") == "source/csrc/cuda/README.md.txt"
    assert sources.place("examples/pyg_gin.py") == "source/examples/pyg_gin.py"


def test_the_site_loads_nothing_from_a_network():
    text = (ROOT / "mkdocs.yml").read_text() + (ROOT / "docs" / "style.css").read_text()
    assert "font: false" in text and "http" not in text
