"""Every Python block of the README and of the pages runs, those of a page one after the other.

Comments in front of a block, ``<!-- needs: package -->`` and ``<!-- not run: why -->``, say where
it cannot run; a package that is absent ends the page there.
"""

import ast
import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

with contextlib.suppress(ImportError):  # before torch_geometric, see conftest.py
    import metatrain.pet  # noqa: F401

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
RUNNING = [page for page in PAGES if "```python" in page.read_text()]
NOT_RUN = {"compiles for a minute", "needs a checkpoint"}  # reasons that a page may give


def blocks(text):
    """(comment in front, source, number of the line above it) of the Python blocks."""
    for found in BLOCK.finditer(text):
        comment, language, source = found.groups()
        if language == "python":
            yield comment or "", source, text[: found.start(3)].count("\n")


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for comment, source, line in blocks(page.read_text()):
        kind, _, rest = comment.partition(": ")
        if kind == "not run":
            assert rest in NOT_RUN
            continue
        if kind == "needs" and importlib.util.find_spec(rest) is None:
            pytest.skip(f"{rest} is not installed: the page is run up to line {line}")
        torch.manual_seed(0)
        exec(compile("\n" * line + source, str(page), "exec"), names)


def test_a_block_is_found_and_its_line_is_that_of_the_page():
    text = "one\n\n<!-- needs: x -->\n```python\n1 / 0\n```\n\n```bash\nls\n```\n"
    assert list(blocks(text)) == [("needs: x", "1 / 0\n", 4)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_text_of_a_page(page):
    """Links to files of the repository exist; nothing speaks of one machine's folders."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).resolve().exists(), target
    assert not re.search(r"(?<![\w/])/(work|tmp|home|root)/", page.read_text())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    there = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert listed == there


def test_the_equations_are_those_of_the_source():
    source = ast.get_docstring(ast.parse((ROOT / "attnpool_kernels" / "autograd.py").read_text()))
    lines = [x for x in source.splitlines() if x.startswith("    (")]
    equations = [x for line in lines for x in re.split(r"\s+(?=\([FBD]\d+\))", line.strip())]
    page = (ROOT / "docs" / "equations.md").read_text().splitlines()
    shown = [x for x in page if re.match(r"\([FBD]\d+\) +\S", x)]
    assert len(equations) == 3 + 8 + 13
    assert sorted(map(str.split, equations)) == sorted(map(str.split, shown))
