"""Lets pages link to files of the repository: ``[CSV](../benchmarks/results/cpu/paper.csv)``.

Such links work where the repository is browsed; the built site has no repository around it, so the
files are copied into it, under ``source/``, and the links point there. Markdown outside the pages
is copied as text, since its own links lead elsewhere. A link to nothing fails the build.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)(?=[)#])")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def outside(page: str, target: str) -> str | None:
    """The path of a link's target from the root of the repository; None inside the pages."""
    found = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if found.startswith("docs/") else found


def place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return f"source/{path}.txt" if path.endswith(".md") else f"source/{path}"


def on_files(files, config):
    wanted = set()
    for page in files.documentation_pages():
        text = FENCE.sub("", Path(page.abs_src_path).read_text(encoding="utf-8"))
        wanted |= {outside(page.src_uri, target) for _, target in LINK.findall(text)}
    for path in sorted(wanted - {None}):
        if (ROOT / path).is_file():
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri

    def moved(match):
        path = outside(here, match[2])
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(place(path), posixpath.dirname(here) or os.curdir)

    return LINK.sub(moved, markdown)
