"""Downloads, archives, caches: what is on the disk afterwards, above all when something failed."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from attnpool_kernels.zoo.datasets.files import Download, Folder, fetch


@pytest.fixture(scope="module")
def server():
    """Serves ``bodies`` by path; /cut announces twice as many bytes as it sends."""
    bodies = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = bodies.get(self.path)
            if body is None:
                return self.send_error(404)
            cut = self.path.startswith("/cut")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) * (2 if cut else 1)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", bodies
    running.shutdown()
    thread.join()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{mode}") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_download_of_a_file(server, tmp_path):
    url, bodies = server
    bodies["/plain.npz"] = os.urandom(3 << 20)
    fetch(Download(f"{url}/plain.npz", ("x.npz",)), tmp_path / "new")
    assert (tmp_path / "new" / "x.npz").read_bytes() == bodies["/plain.npz"]
    assert os.listdir(tmp_path / "new") == ["x.npz"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "file?filename=a.tar.bz2&record_id=1"])
def test_download_of_an_archive(server, tmp_path, name):
    url, bodies = server
    members = {"deep/er/one.csv": b"1" * 5000, "deep/two.sdf": b"2", "../evil": b"no"}
    if name == "a.zip":
        bodies["/a.zip"] = zipped(members)
    else:
        bodies[f"/{name}"] = tarred(members, "gz" if name.endswith("gz") else "bz2")
    fetch(Download(f"{url}/{name}", ("one.csv", "two.sdf")), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["one.csv", "two.sdf"]
    assert (tmp_path / "one.csv").read_bytes() == b"1" * 5000
    with pytest.raises(ValueError, match=r"does not hold three, got .*one.csv"):
        fetch(Download(f"{url}/{name}", ("three",)), tmp_path)
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("file", ["cut.npz", "cut.zip"])
def test_a_download_that_is_cut_off_leaves_nothing(server, tmp_path, file):
    url, bodies = server
    bodies[f"/{file}"] = zipped({"cut.npz": os.urandom(1000)})
    with pytest.raises(OSError, match=r"was cut off: \d+ of \d+ bytes|could not be fetched"):
        fetch(Download(f"{url}/{file}", ("cut.npz",)), tmp_path)
    assert os.listdir(tmp_path) == []


def test_damaged_archives_and_wrong_addresses_leave_nothing(server, tmp_path):
    url, bodies = server
    whole = bytearray(zipped({"x.npz": os.urandom(5000)}))
    bodies["/half.zip"] = bytes(whole[: len(whole) // 2])
    whole[2000] ^= 1
    bodies["/flipped.zip"] = bytes(whole)
    bodies["/half.tar.gz"] = tarred({"x.npz": os.urandom(5000)}, "gz")[:2000]
    bodies["/none.zip"] = b""
    for name in ("half.zip", "flipped.zip", "half.tar.gz"):
        with pytest.raises(ValueError, match=f"{name} gave a damaged archive"):
            fetch(Download(f"{url}/{name}", ("x.npz",)), tmp_path)
    with pytest.raises(OSError, match="gave an empty file"):
        fetch(Download(f"{url}/none.zip", ("x.npz",)), tmp_path)
    with pytest.raises(OSError, match=r"nowhere.zip could not be fetched: .*404"):
        fetch(Download(f"{url}/nowhere.zip", ("x.npz",)), tmp_path)
    assert os.listdir(tmp_path) == []


def test_files_are_fetched_only_where_asked_and_only_once(tmp_path):
    (tmp_path / "there").write_text("1")
    source = Download((tmp_path / "there").as_uri(), ("x",))
    (tmp_path / "to").mkdir()
    with pytest.raises(FileNotFoundError, match=r"set needs x, which is not in .*/to; look"):
        Folder("set", "look there", tmp_path / "to").need("x", source)
    folder = Folder("set", "look there", tmp_path / "to", download=True)
    path = folder.need("x", source)
    assert path.read_text() == "1"
    (tmp_path / "there").write_text("2")
    assert folder.need("x", source).read_text() == "1"
    with pytest.raises(FileNotFoundError, match=r"y, which is not in .* has no address"):
        folder.need("y")


def test_digests(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    Folder("set", "", path, sha256=digest.upper()).check(path)
    Folder("set", "", path, sha256={"x": digest, "y": "0"}).check(path)
    with pytest.raises(ValueError, match=f"must be 0, got {digest}"):
        Folder("set", "", path, sha256={"x": "0"}).check(path)
    folder = Folder("set", "", path, sha256={"x": digest, "z": "0"})
    folder.check(path)
    with pytest.raises(ValueError, match="must name files that are read, x; got z"):
        folder.all_checked()
    folder = Folder("set", "", path, sha256=digest)
    folder.check(path)
    (tmp_path / "companion").write_bytes(b"another")
    folder.check(tmp_path / "companion")  # one digest is of the main file
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        Folder("set", "", path).check(path)


def test_cache(tmp_path):
    path, made = tmp_path / "x.sdf", []
    path.write_text("1")

    def build():
        made.append(1)
        return {"z": np.arange(3), "key_of_mine": np.ones(2)}

    folder = Folder("set", "", path)
    for _ in range(3):
        found = folder.cached(path, 1, build)
        assert sorted(found) == ["key_of_mine", "z"] and found["z"].tolist() == [0, 1, 2]
    assert len(made) == 1
    folder.cached(path, 2, build)  # another reader
    assert len(made) == 2
    path.write_text("22")  # another file
    folder.cached(path, 2, build)
    assert len(made) == 3
    cache = tmp_path / "x.sdf.cache.npz"
    cache.write_bytes(cache.read_bytes()[:200])  # damaged
    assert folder.cached(path, 2, build)["z"].tolist() == [0, 1, 2]
    assert len(made) == 4
    Folder("set", "", path, cache=False).cached(path, 2, build)
    assert len(made) == 5
    assert sorted(os.listdir(tmp_path)) == ["x.sdf", "x.sdf.cache.npz"]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "x.sdf"
    path.write_text("1")

    def full(*arguments, **options):
        raise OSError("no space")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match=r"cache.npz was not written: no space"):
        found = Folder("set", "", path).cached(path, 1, lambda: {"z": np.ones(1)})
    assert found["z"].tolist() == [1] and os.listdir(tmp_path) == ["x.sdf"]
