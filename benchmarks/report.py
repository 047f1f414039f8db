"""One self-contained HTML page from result files: ``python -m benchmarks.report [CSV ...]``.

Without arguments the page shows what is committed under ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .measuring.sheet import OUT, BenchmarkError
from .reporting import page

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.split("\n")[0])
    p.add_argument("csv", nargs="*", type=Path, help="results (default: all committed ones)")
    p.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="the page (default: benchmarks/results/report.html, which is committed; "
        "of CSVs that are named benchmarks/out/report.html)",
    )
    options = p.parse_args(arguments)
    if options.output is None:
        options.output = (OUT if options.csv else RESULTS) / "report.html"
    try:
        paths = options.csv or sorted(RESULTS.glob("*/*.csv"))
        if not paths:
            raise BenchmarkError("no CSV under benchmarks/results; name one")
        text = page.render(paths)
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            part = options.output.with_suffix(".part")
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(options.output)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise BenchmarkError(f"cannot write {options.output}: {error.strerror}") from error
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(paths)} result files, {len(text) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
