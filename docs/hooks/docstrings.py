"""Docstrings as Markdown: ``::`` blocks become code, and stars stay stars."""

import re

from griffe import Extension

CODE = re.compile(r"(``.+?``|`[^`\n]+`)", re.S)


def markdown(text: str) -> str:
    """A docstring whose literal blocks are fenced and whose prose holds no accidental markup."""
    lines, out, fence = text.splitlines(), [], None  # fence: indentation of the block's parent
    paragraph: list[str] = []

    def flush() -> None:
        parts = CODE.split("\n".join(paragraph))
        if paragraph:
            parts[::2] = [re.sub(r"([*<])", r"\\\1", x) for x in parts[::2]]
            out.extend("".join(parts).split("\n"))
        paragraph.clear()

    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if fence is not None:
            if line.strip() and indent <= fence:
                while out and not out[-1].strip():
                    out.pop()
                out.extend([" " * fence + "```", ""])
                fence = None
            else:
                out.append(line[4:] if line.strip() else line)
                continue
        if line.lstrip().startswith((">>>", "...")) or _result(lines, i):
            flush()
            out.append(line)
        elif line.rstrip().endswith("::"):
            head = line.rstrip()[:-2]
            paragraph.append(head + ":" if head.strip() else "")
            flush()
            fence = indent
            out.extend(["", " " * fence + "```text"])
        else:
            paragraph.append(line)
    flush()
    if fence is not None:
        out.append(" " * fence + "```")
    return "\n".join(out)


def _result(lines: list[str], i: int) -> bool:
    """Whether a line is what a doctest above it prints."""
    for line in reversed(lines[:i]):
        if not line.strip() or not lines[i].strip():
            return False
        if line.lstrip().startswith((">>>", "...")):
            return True
    return False


class Markdown(Extension):
    """Rewrites every docstring once it has been read."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
