"""Files of a data set: looked for, checked, fetched and cached.

Nothing half-written is ever left under a final name: whatever is written goes to a temporary name
in the same folder and is renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import os
import sqlite3
import tarfile
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

import numpy as np

from ..progress import of_bytes

BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Download:
    """An address, and the files that it gives: itself, or members of the zip or tar behind it."""

    url: str
    files: tuple[str, ...]

    @property
    def archive(self) -> bool:
        return self.url.split("?")[0].endswith((".zip", ".tar.gz", ".tgz")) or ".tar." in self.url


class Folder:
    """The place of one data set: a folder, or one file of it.

    Args:
        name: of the data set. where: how to get its files, the end of the error for a missing one.
        path: folder or file; None: ``data/<name>``, then ``data``, of the working directory.
        download: whether files that are missing may be fetched, into the folder.
        sha256: digest of the main file (the first that is read), or of any files by their names.
        cache: whether what was parsed is kept beside the file, as ``<file>.cache.npz``.
    """

    def __init__(
        self,
        name: str,
        where: str,
        path: str | os.PathLike | None = None,
        download: bool = False,
        sha256: str | Mapping[str, str] | None = None,
        cache: bool = True,
    ) -> None:
        self.name, self.where, self.download, self.cache = name, where, download, cache
        self.path = None if path is None else Path(path).expanduser()
        if self.path is None:
            self.places = [Path("data") / name, Path("data")]
        else:
            self.places = [self.path]
            if not self.path.exists() and not download:
                raise FileNotFoundError(f"{self.path} does not exist; {where}")
        self._sha256 = sha256
        self._checked: list[str] = []

    @property
    def file(self) -> Path | None:
        """The path, where it is a file and not a folder."""
        return self.path if self.path is not None and self.path.is_file() else None

    def find(self, *names: str) -> Path | None:
        """The first of the files (or folders) that exists, there or in ``raw/``."""
        if self.file is not None:
            return (
                self.file if any(PurePosixPath(n).name == self.file.name for n in names) else None
            )
        for place in self.places:
            for name in names:
                for path in (place / name, place / "raw" / name):
                    if path.exists():
                        return path
        return None

    def need(self, name: str, download: Download | None = None) -> Path:
        """A file that must be there, fetched where that is allowed; FileNotFoundError."""
        found = self.find(name)
        if found is None and self.file is not None:
            found = self.file.parent / name  # the companion of a file that was named
            found = found if found.exists() else None
        if found is None and self.download and download is not None:
            folder = self.places[0] if self.file is None else self.file.parent
            fetch(download, folder)
            found = folder / name
        if found is None:
            self.missing(name)
        return found

    def missing(self, *names: str) -> NoReturn:
        """Raises FileNotFoundError: which files were looked for, where, and how to get them."""
        places = " or ".join(str(place) for place in self.places)
        reason = ""
        if self.download:
            reason = " and has no address to download it from"
        raise FileNotFoundError(
            f"{self.name} needs {' or '.join(names)}, which is not in {places}{reason}; "
            f"{self.where}"
        )

    def check(self, path: Path) -> str | None:
        """ValueError for an empty file and for a wrong digest; the digest that was asked for."""
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; {self.where}")
        if isinstance(self._sha256, Mapping):
            wanted = self._sha256.get(path.name)
        else:
            wanted = None if self._checked else self._sha256
        self._checked.append(path.name)
        if wanted is not None:
            found = digest(path)
            if found != wanted.lower():
                raise ValueError(f"sha256 of {path} must be {wanted}, got {found}")
        return wanted

    def all_checked(self) -> None:
        """ValueError for digests of files that were not read."""
        if isinstance(self._sha256, Mapping):
            unread = sorted(set(self._sha256) - set(self._checked))
            if unread:
                raise ValueError(
                    f"sha256 must name files that are read, {', '.join(self._checked)}; "
                    f"got {', '.join(unread)}"
                )

    def cached(
        self, path: Path, version: int, build: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """What ``build`` makes of a file, from ``<file>.cache.npz`` where that is of this file.

        The cache holds the size and time of the file and the version of its reader; it is remade
        where they differ. A folder that cannot be written costs a warning.
        """
        stat = path.stat()
        key = np.array([stat.st_size, stat.st_mtime_ns, version], dtype=np.int64)
        cache = path.with_name(path.name + ".cache.npz")
        if self.cache and cache.exists():
            with contextlib.suppress(ValueError):  # damaged
                stored = arrays(cache, ("key",))
                if np.array_equal(stored.pop("key"), key):
                    return stored
        made = build()
        if self.cache:
            try:
                with replacing(cache) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **made, key=key)  # type: ignore[arg-type]
            except OSError as error:
                warnings.warn(f"{cache} was not written: {error}", stacklevel=3)
        return made


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, renamed to it at the end unless that raises."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power failure leaves the new name and no contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        total = hashlib.sha256()
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def fetch(download: Download, folder: Path) -> None:
    """Fetches the files of an address into a folder; OSError or ValueError, and then no file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not download.archive:
        with replacing(folder / download.files[0]) as temporary:
            _receive(download.url, temporary)
        return
    archive = folder / f".{uuid.uuid4().hex}.part"
    try:
        _receive(download.url, archive)
        try:
            _unpack(archive, download, folder)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError(f"{download.url} gave a damaged archive: {error}") from error
    finally:
        archive.unlink(missing_ok=True)


def _receive(url: str, path: Path) -> None:
    try:
        got, total = _copied(url, path)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} could not be fetched: {error}; nothing was kept") from error
    if total is not None and got != total:
        raise OSError(f"{url} was cut off: {got} of {total} bytes; nothing was kept, try again")
    if got == 0:
        raise OSError(f"{url} gave an empty file; nothing was kept")


def _copied(url: str, path: Path) -> tuple[int, int | None]:
    """Bytes received and announced."""
    with urllib.request.urlopen(url) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        with of_bytes(total, f"fetching {url}") as came:
            while block := response.read(BLOCK):
                file.write(block)
                came(len(block))
        return file.tell(), total


def _unpack(archive: Path, download: Download, folder: Path) -> None:
    """Writes the wanted members under their own names, whatever folder they have in the archive."""
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(archive):
            zipped = stack.enter_context(zipfile.ZipFile(archive))
            members: dict[str, Callable] = {
                name: lambda name=name: zipped.open(name) for name in zipped.namelist()
            }
        else:
            tar = stack.enter_context(tarfile.open(archive))
            members = {
                m.name: lambda m=m: tar.extractfile(m) for m in tar.getmembers() if m.isfile()
            }
        sources = {PurePosixPath(name).name: opener for name, opener in members.items()}
        for wanted in download.files:
            if wanted not in sources:
                raise ValueError(f"{download.url} does not hold {wanted}, got {sorted(sources)}")
        for wanted in download.files:
            target = folder / wanted
            with sources[wanted]() as source, replacing(target) as temporary:
                _copy(source, temporary)


def _copy(source: IO[bytes], path: Path) -> None:
    with open(path, "wb") as file:
        while block := source.read(BLOCK):
            file.write(block)


def arrays(path: Path | IO[bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, of which these must be there and be real numbers; ValueError."""
    if not _is_archive(path):  # NumPy would advise to load it as a pickle, which runs code
        raise ValueError(f"{path} cannot be read as .npz: it is not an .npz archive")
    check_archive(path)
    if not isinstance(path, Path):
        path.seek(0)
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged file raises whatever its bytes spell
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    absent = [name for name in names if name not in found]
    if absent:
        raise ValueError(
            f"{path} must hold {', '.join(names)}; missing: {', '.join(absent)} "
            f"(it holds {', '.join(found)})"
        )
    for name in names:
        if found[name].dtype.kind not in "iuf":
            raise ValueError(f"{name} of {path} must be real numbers, got others")
        if not found[name].ndim:
            raise ValueError(f"{name} of {path} must be an array, got one number")
    return found


def _is_archive(path: Path | IO[bytes]) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # where it looks at more than the signature
        raise ValueError(f"{path} is damaged: {error}") from error


def check_archive(path: Path | IO[bytes]) -> None:
    """ValueError for a zip archive of which a member is not what was written, by its checksum.

    NumPy does not see that where a damaged header asks for less than there is, torch never does.
    """
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
            # torch takes no data of a member that is marked as a folder, and says nothing.
            folders = [x for x in archive.infolist() if x.external_attr & 0x10 and x.file_size]
    except Exception as error:  # a damaged file raises whatever its bytes spell
        raise ValueError(f"{path} is damaged: {error}") from error
    if folders:
        raise ValueError(f"{path} is damaged: {folders[0].filename} is marked as a folder")
    if wrong is not None:
        raise ValueError(f"{path} is damaged: the checksum of {wrong} is another")


def check_database(path: Path) -> None:
    """ValueError for a database of SQLite whose tables and indices do not agree.

    A damaged page may hide rows: then fewer come out, without an error.
    """
    try:
        address = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            found = database.execute("PRAGMA integrity_check(1)").fetchone()
    except Exception as error:  # a damaged file raises whatever its bytes spell
        raise ValueError(f"{path} cannot be read as a database of ASE: {error}") from error
    if found != ("ok",):
        raise ValueError(f"{path} is a damaged database: {' '.join(str(found[0]).split())}")
