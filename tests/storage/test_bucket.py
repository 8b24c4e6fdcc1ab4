"""Storage in a bucket. Most of it must work where listings show nothing of what was put."""

from pathlib import Path

import fsspec
import pytest
from bucket import ALL, NOTHING

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.storage import bucket as places


@pytest.fixture
def root(bucket):
    return storage.path("gs://bucket/run")


def names(bucket):
    return sorted(name.removeprefix("bucket/run/") for name in bucket.stored)


def test_paths(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.path("~/run") == tmp_path / "run" and isinstance(storage.path("run"), Path)
    assert storage.path(tmp_path) == tmp_path
    path = storage.path("gs://bucket/run")
    assert str(path / "a" / "b") == "gs://bucket/run/a/b" and storage.path(path) == path
    assert storage.resolved(path / "a") == path / "a"
    with pytest.raises(UserError, match="s3://bucket/run: only paths on a disk and gs:// are known"):
        storage.path("s3://bucket/run")


def test_without_a_client_the_extra_is_named(bucket, monkeypatch):
    def missing(protocol):
        raise ImportError

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"gs://bucket/run needs gcsfs: pip install 'llm_jax\[gcs\]'"):
        storage.path("gs://bucket/run")


@pytest.mark.parametrize("shown", [ALL, NOTHING])
def test_publish_puts_the_object_whole_and_once(bucket, root, shown):
    bucket.shown = shown
    for data in (b"old", b"new", b""):
        with storage.publish(root / "file") as file:
            file.write(data)
        assert storage.read_bytes(root / "file", "") == data and storage.size(root / "file") == len(data)
    assert bucket.puts == ["bucket/run/file"] * 3
    assert storage.content_hash(root / "file") == storage.text_hash("")
    with pytest.raises(UserError, match="gs://bucket/run/absent is missing"):
        storage.read_sealed(root / "absent")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_object(bucket, root, error):
    storage.write_text(root / "file", "old")
    with pytest.raises(error), storage.publish(root / "file") as file:
        file.write(b"half")
        file.flush()
        raise error
    assert (root / "file").read_text() == "old" and len(bucket.puts) == 1


def test_a_put_that_fails_is_named(bucket, root, monkeypatch):
    def refuses(*_):
        raise OSError("Forbidden: no permission to create objects")

    monkeypatch.setattr(bucket, "put", refuses)
    with pytest.raises(UserError, match=r"cannot write gs://bucket/run/file: Forbidden: no permission"):
        storage.write_text(root / "file", "text")


def test_ranges_fetch_blocks_and_each_once(bucket, root):
    data = bytes(i * 7 % 251 for i in range(3 * places.RANGE_BYTES + 100))
    bucket.put("bucket/run/object", data)
    ranges = storage.open_ranges(root / "object")
    assert ranges.size == len(data) and bucket.fetched == 0
    edge = places.RANGE_BYTES
    for begin, end in ((5, 25), (0, 1), (edge - 3, edge), (7, 7)):
        assert ranges.read(begin, end) == data[begin:end]
    assert bucket.fetched == edge
    assert ranges.read(edge - 3, edge + 3) == data[edge - 3 : edge + 3] and bucket.fetched == 2 * edge
    assert ranges.read(3 * edge, 3 * edge + 500) == data[3 * edge :] and bucket.fetched == 2 * edge + 100
    assert ranges.read(0, len(data)) == data and bucket.fetched == len(data)


def test_ranges_keep_so_many_blocks(bucket, root, monkeypatch):
    monkeypatch.setattr(places, "RANGE_BYTES", 10)
    monkeypatch.setattr(places, "RANGES_KEPT", 2)
    bucket.put("bucket/run/object", bytes(100))
    ranges = storage.open_ranges(root / "object")
    for begin in (0, 10, 0, 10, 20, 10):
        ranges.read(begin, begin + 1)
    assert bucket.fetched == 30
    ranges.read(0, 1)
    assert bucket.fetched == 40


def test_a_log_is_whole_after_a_sync_and_in_pieces(bucket, root, monkeypatch):
    """Never closed, as after a kill; read back without a listing."""
    bucket.shown = NOTHING
    monkeypatch.setattr(places, "PIECE_BYTES", 100)
    log, lines = storage.open_log(root / "0001.jsonl"), [f"line {i:04d}\n" for i in range(95)]
    assert storage.read_log(root / "0001.jsonl") == ""
    for number, line in enumerate(lines, start=1):
        log.write(line)
        if number % 7 == 0:
            log.sync()
            assert storage.read_log(root / "0001.jsonl") == "".join(lines[:number])
    assert names(bucket) == ["0001.jsonl", *(f"0001.jsonl.{i:03d}" for i in range(1, 10))]
    assert max(len(data) for data, _ in bucket.stored.values()) <= 110


def test_a_log_is_put_twice_a_minute(bucket, root, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(places.time, "monotonic", lambda: now[0])
    log = storage.open_log(root / "log")
    for _ in range(600):  # a line every tenth of a second
        now[0] += 0.1
        log.write("line\n")
    assert 2 <= len(bucket.puts) <= 3
    log.close()
    assert storage.read_log(root / "log") == "line\n" * 600


@pytest.mark.parametrize("shown", [ALL, NOTHING])
def test_the_marker_of_a_directory_is_put_last(bucket, root, shown):
    bucket.shown = shown
    with storage.publish_directory(root / "data", "header.json") as local:
        for name in ("header.json", "a.tokens", "z.tokens"):
            (local / name).write_text(name)
        assert bucket.puts == []
    assert bucket.puts == [f"bucket/run/data/{name}" for name in ("a.tokens", "z.tokens", "header.json")]
    assert not local.exists()


def test_an_upload_that_is_killed_lacks_the_marker_and_is_made_again(bucket, root, monkeypatch):
    def make(content):
        with storage.publish_directory(root / "data", "header.json") as local:
            for name in ("header.json", "a.tokens", "z.tokens"):
                (local / name).write_text(content)

    put, left = bucket.put, [1]

    def dies(*args):
        left[0] -= 1
        return put(*args) if left[0] >= 0 else exit()

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(bucket, "put", dies)
        make("old")
    assert names(bucket) == ["data/a.tokens"] and not storage.occupied(root / "data")
    make("new")
    assert {data for data, _ in bucket.stored.values()} == {b"new"} and len(bucket.stored) == 3


def test_directories_are_copied_and_removed_marker_first(bucket, root, monkeypatch):
    for name in ("manifest.json", "x/1", "z/2"):
        storage.write_text(root / "a" / name, name)
    assert storage.files(root / "a") == [root / "a" / name for name in ("manifest.json", "x/1", "z/2")]
    storage.duplicate(root / "a", root / "b", "manifest.json")
    assert bucket.puts[-1] == "bucket/run/b/manifest.json"
    storage.set_aside(root / "b", root / "aside", "manifest.json")
    assert names(bucket) == [
        f"{where}/{name}" for where in ("a", "aside") for name in ("manifest.json", "x/1", "z/2")
    ]
    storage.remove_tree(root / "a")
    storage.remove_tree(root / "a")
    assert len(names(bucket)) == 3


def test_names_are_remembered_where_listings_lag(bucket, root, tmp_path):
    bucket.shown = NOTHING
    assert storage.remembered(root) == []
    storage.remember(root, ["00000020", "00000010"])
    assert storage.remembered(root) == ["00000010", "00000020"] and list(root.glob("*")) == []
    storage.remember(tmp_path, ["00000010"])
    assert storage.remembered(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_libraries_that_write_to_the_disk(bucket, root, tmp_path):
    with storage.written_locally(root / "profile") as local:
        (local / "plugins").mkdir()
        (local / "plugins" / "trace").write_text("trace")
    assert names(bucket) == ["profile/plugins/trace"] and not local.exists()
    with storage.written_locally(tmp_path) as local:
        assert local == tmp_path


def test_the_last_claim_holds(bucket, root):
    """Of two starts of one run. A process that was killed is in nobody's way."""
    bucket.put("bucket/run/.lock", b"of a process that was killed")
    mine = storage.lock(root / ".lock")
    storage.write_text(root / "checkpoints" / "manifest.json", "mine")
    bucket.put("bucket/run/.lock", b"of a later start")
    for _ in range(2):
        with pytest.raises(UserError, match="gs://bucket/run was taken over by a later start"):
            storage.write_text(root / "checkpoints" / "manifest.json", "late")
    storage.write_text(storage.path("gs://bucket/runner/file"), "of another run")
    bucket.remove("bucket/run/.lock")
    with pytest.raises(UserError, match="gs://bucket/run was taken over by a later start, or removed"):
        storage.write_text(root / "samples.txt", "late")
    assert (root / "checkpoints" / "manifest.json").read_text() == "mine"
    mine.close()
    storage.write_text(root / "report.html", "by a reader, who claims nothing")
    assert not storage.has_locks(root)
