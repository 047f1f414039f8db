"""Results as CSV: one row per measurement, one comment line of provenance for each run.

A run appends to its file. A row is written whole or not at all: where the disk is full the
half-written row is cut off again, earlier rows stay, and one message says so. At the end of a run
its limits are settled: the whole file is then replaced at once, or left as it is.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from .clock import Timing

OUT = Path(__file__).resolve().parents[1] / "out"  # results that nobody has chosen to commit
COMMENT = "# run "


class BenchmarkError(Exception):
    """Something that the user can repair; shown as one message, exit code 2."""


@dataclass
class Row:
    """One contender on one workload and pass. Times in milliseconds, sizes in bytes."""

    suite: str
    family: str
    workload: str
    x: int | None
    molecules: int
    atoms: int
    longest: int
    heads: int
    dim: int
    seeds: int | None
    dtype: str
    layout: str
    what: str
    contender: str
    kernel: str
    ours: int
    status: str  # ok, refused, wrong, oom, timeout, error, skipped
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    check: str = ""
    flops: float | None = None
    bytes: float | None = None
    limit_ms: float | None = None
    ratio: float | None = None  # p50 over limit
    run: int = 0
    limit_by: str = ""  # see rates.Rates.limit_by; empty in files older than this column
    library_ms: float | None = None  # at the rate of the library's product; None there

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.family, self.workload, self.what, self.contender)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def timed(self) -> bool:
        """It has a time: a file may hold a row without one, which tables and figures leave out."""
        return self.ok and 0 < (self.p50_ms or 0) < math.inf

    def fill(self, timing: Timing) -> None:
        """Takes the quantiles and the number of samples of a timing."""
        self.p20_ms, self.p50_ms, self.p80_ms = (timing.quantile(q) for q in (0.2, 0.5, 0.8))
        self.samples = len(timing.samples)


COLUMNS = tuple(f.name for f in fields(Row))
LATER = ("limit_by", "library_ms")  # columns that older files do not have
_TYPES = {f.name: str(f.type) for f in fields(Row)}
STATUSES = ("ok", "refused", "wrong", "oom", "timeout", "error", "skipped")


class Sheet:
    """An open results file that rows are appended to."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.runs: list[dict] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._mend()
                self.rows, self.runs = read(path)
                with open(path, encoding="utf-8") as file:
                    old = file.readline().rstrip("\n") != _line(COLUMNS).rstrip("\n")
                if old:  # rows that are appended must have the columns of the header
                    self.rewrite()
            elif path.exists() and path.is_file() and path.stat().st_size:
                path.replace(path.with_suffix(path.suffix + ".old"))
        except OSError as error:
            raise BenchmarkError(f"cannot write results to {path}: {error.strerror}") from error

    def start(self, provenance: dict) -> None:
        self.run = len(self.runs)
        self.runs.append(provenance)
        head = "" if self.path.exists() and self.path.stat().st_size else _line(COLUMNS)
        self._append(head + COMMENT + json.dumps({"run": self.run, **provenance}) + "\n")

    def add(self, row: Row) -> None:
        row.run = self.run
        self.rows = [old for old in self.rows if old.key != row.key] + [row]
        self._append(_row(row))

    def rewrite(self) -> None:
        """Replaces the file by what is held here, in one step."""
        parts = [_line(COLUMNS)]
        for number, about in enumerate(self.runs):
            about = {"run": number} | about | {"run": number}
            parts.append(COMMENT + json.dumps(about) + "\n")
            parts += [_row(row) for row in self.rows if row.run == number]
        parts += [_row(row) for row in self.rows if not 0 <= row.run < len(self.runs)]
        new = self.path.with_suffix(self.path.suffix + ".part")
        try:
            new.write_text("".join(parts), encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise BenchmarkError(
                f"cannot write to {self.path}: {error.strerror}; its rows are kept as they were"
            ) from error

    def done(self) -> set[tuple[str, str, str, str]]:
        """Measurements that need not be repeated: all but those that were skipped."""
        return {row.key for row in self.rows if row.status != "skipped"}

    def _append(self, text: str) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                file.write(text)
                file.flush()
        except OSError as error:
            if self.path.is_file():
                os.truncate(self.path, size)
            raise BenchmarkError(
                f"cannot write to {self.path}: {error.strerror}. The rows before this one are "
                "kept; go on with --resume once there is space"
            ) from error

    def _mend(self) -> None:
        """Cuts off a last line that was interrupted while it was written."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)


def _row(row: Row) -> str:
    values = [getattr(row, name) for name in COLUMNS]
    return _line([f"{x:.6g}" if isinstance(x, float) else x for x in values])


def _line(values) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(["" if x is None else x for x in values])
    return buffer.getvalue()


def read(path: Path) -> tuple[list[Row], list[dict]]:
    """Rows and provenance of a file; a later row replaces an earlier one of the same measurement.

    Raises BenchmarkError naming the first damaged line.
    """
    rows: dict[tuple, Row] = {}
    runs, header = [], None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise BenchmarkError(f"cannot read {path}: {why}") from error

    def damaged(number: int, why: str) -> BenchmarkError:
        return BenchmarkError(
            f"{path}, line {number}: {why}. Nothing was changed; repair the file or move it away"
        )

    for number, line in enumerate(lines, 1):
        if line.startswith(COMMENT):
            try:
                runs.append(json.loads(line.removeprefix(COMMENT)))
            except json.JSONDecodeError:
                raise damaged(number, "provenance that is not JSON") from None
            continue
        values = next(csv.reader([line]), [])
        if header is None:
            header = tuple(values)
            for name in header:
                if name not in COLUMNS:
                    raise damaged(number, f"unknown column {name!r}")
            missing = [name for name in COLUMNS if name not in (*header, *LATER)]
            if missing:
                raise damaged(number, f"missing column {missing[0]!r}")
            continue
        if len(values) != len(header):
            raise damaged(number, f"{len(values)} fields, expected {len(header)}")
        try:
            row = Row(**{name: _parse(name, x) for name, x in zip(header, values)})
        except ValueError as error:
            raise damaged(number, str(error)) from None
        rows.pop(row.key, None)
        rows[row.key] = row
    if header is None:
        raise BenchmarkError(f"{path} holds no results: it has no header line")
    return list(rows.values()), runs


def _parse(name: str, text: str):
    kind = _TYPES[name]
    if name == "status" and text not in STATUSES:
        raise ValueError(f"status {text!r} is none of {', '.join(STATUSES)}")
    if kind.startswith("str"):
        return text
    if text == "":
        if "None" in kind:
            return None
        raise ValueError(f"column {name} is empty")
    try:
        return float(text) if kind.startswith("float") else int(text)
    except ValueError:
        raise ValueError(f"column {name}: {text!r} is not a number") from None
