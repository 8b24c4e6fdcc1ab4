"""A stand-in for a bucket: objects put whole and read by name, listings that lag behind; nothing else works.

It has two doors to the same objects: a file system of fsspec, which epath asks for ``gs://``, and the part of
Google's HTTP interface that tensorstore speaks, by which orbax writes arrays.
"""

import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
import pytest

NAME = "bucket"
ALL, NOTHING = float("inf"), 0  # of what was put and removed, in listings


class Objects:
    """shown: which changes listings show, by their number; those below a directory ``state`` show all, as
    orbax does not stand it otherwise. fetched: bytes read; puts: names, in order."""

    def __init__(self):
        self._lock = threading.Lock()
        self.reset()

    def reset(self, content=((), (), 0)):
        stored, history, self._now = content
        self.stored, self._history = dict(stored), list(history)
        self.shown, self.fetched, self.puts = ALL, 0, []

    def content(self):
        """What ``reset`` brings back."""
        return dict(self.stored), list(self._history), self._now

    def put(self, name, data, generation=None):
        """generation: what the object must be, 0 for none. Gives the new one, or None."""
        with self._lock:
            if generation is not None and self.stored.get(name, (b"", 0))[1] != generation:
                return None
            self._note(name, True)
            self.stored[name] = bytes(data), self._now
            self.puts.append(name)
            return self._now

    def get(self, name, start=None, stop=None):
        with self._lock:
            if name not in self.stored:
                raise FileNotFoundError(name)
            data = self.stored[name][0][start:stop]
            self.fetched += len(data)
            return data

    def remove(self, name):
        with self._lock:
            if name not in self.stored:
                raise FileNotFoundError(name)
            self._note(name, False)
            del self.stored[name]

    def listed(self, prefix):
        """The names that listings show."""
        with self._lock:
            shown = ALL if "/state" in prefix else self.shown
            there = {name: put for at, name, put in self._history if at <= shown}
            return sorted(name for name, put in there.items() if put and name.startswith(prefix))

    def show_before(self, name):
        """Listings stay as they were just before ``name`` was put."""
        self.shown = max(at for at, other, put in self._history if other == name and put) - 1

    def _note(self, name, put):
        self._now += 1
        self._history.append((self._now, name, put))


OBJECTS = Objects()


class Upload(io.BytesIO):
    def __init__(self, name):
        super().__init__()
        self._name = name

    def close(self):
        if not self.closed:
            OBJECTS.put(self._name, self.getvalue())
        super().close()


class FileSystem(fsspec.AbstractFileSystem):
    """What a bucket cannot do raises."""

    protocol = ("gs", "gcs")

    def __init__(self, use_listings_cache=True, finalize_on_close=False):
        super().__init__()
        assert not use_listings_cache, "gcsfs keeps listings for ever unless it is told not to"

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            return io.BytesIO(OBJECTS.get(path))
        if mode == "wb":
            return Upload(path)
        raise NotImplementedError(f"an object cannot be opened as {mode}")

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS.stored:
            return {"name": path, "size": len(OBJECTS.stored[path][0]), "type": "file"}
        if OBJECTS.listed(path + "/"):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        below = [name.removeprefix(path + "/").split("/") for name in OBJECTS.listed(path + "/")]
        found = {f"{path}/{first}": "directory" if rest else "file" for first, *rest in below}
        if not found:
            return [self.info(path)] if detail else [self.info(path)["name"]]
        sizes = {name: len(OBJECTS.stored.get(name, (b"",))[0]) for name in found}
        entries = [{"name": name, "size": sizes[name], "type": kind} for name, kind in found.items()]
        return entries if detail else list(found)

    def cat_file(self, path, start=None, end=None, **_):
        return OBJECTS.get(self._strip_protocol(path), start, end)

    def cp_file(self, path1, path2, **_):
        OBJECTS.put(self._strip_protocol(path2), OBJECTS.stored[self._strip_protocol(path1)][0])

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        for name in OBJECTS.listed(path + "/") if recursive else [path]:
            OBJECTS.remove(name)

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def mv(self, *_, **__):
        raise NotImplementedError("an object cannot be renamed")

    rename = mv


class Door(BaseHTTPRequestHandler):
    """The JSON interface of Google Cloud Storage, as far as tensorstore uses it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        query = dict(parse_qsl(urlsplit(self.path).query))
        wanted = int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None
        name = f"{NAME}/{query['name']}"
        data = self.rfile.read(int(self.headers["Content-Length"]))
        generation = OBJECTS.put(name, data, wanted)
        told = {"name": query["name"], "size": str(len(data)), "generation": str(generation)}
        self._answer(200 if generation else 412, json.dumps(told).encode())

    def do_GET(self):
        url = urlsplit(self.path)
        query, name = dict(parse_qsl(url.query)), unquote(url.path.partition("/o/")[2])
        if not name:
            names = OBJECTS.listed(f"{NAME}/{query.get('prefix', '')}")
            items = [{"name": name.removeprefix(f"{NAME}/")} for name in names]
            return self._answer(200, json.dumps({"items": items}).encode())
        if f"{NAME}/{name}" not in OBJECTS.stored:
            return self._answer(404)
        size, generation = len(OBJECTS.stored[f"{NAME}/{name}"][0]), OBJECTS.stored[f"{NAME}/{name}"][1]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start = int(first) if first else size - int(last)
        data = OBJECTS.get(f"{NAME}/{name}", start, int(last) + 1 if first and last else None)
        place = f"bytes {start}-{start + len(data) - 1}/{size}"
        return self._answer(206 if "Range" in self.headers else 200, data, generation, place)

    def do_DELETE(self):
        OBJECTS.remove(f"{NAME}/{unquote(urlsplit(self.path).path.partition('/o/')[2])}")
        self._answer(204)

    def _answer(self, code, body=b"", generation=None, place=None):
        self.send_response(code)
        for header, value in (("x-goog-generation", generation), ("Content-Range", place)):
            if value is not None:
                self.send_header(header, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def doors():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://{place}"
    os.environ["GCE_METADATA_ROOT"] = place  # where it asks for credentials: there are none
    for protocol in FileSystem.protocol:
        fsspec.register_implementation(protocol, FileSystem, clobber=True)
    return OBJECTS


@pytest.fixture
def bucket(doors):
    """The objects behind gs://bucket/, none yet."""
    doors.reset()
    return doors
