import json
import os
from pathlib import Path

import pytest

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.storage import sealed

VALUE = {"name": "ünï", "numbers": [1, 2.5, None, True], "text": 'a "quoted"\nline'}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_publish_replaces_the_file_whole(tmp_path):
    path = tmp_path / "file"
    for data in (b"old", b"new", b""):
        with storage.publish(path) as file:
            file.write(data)
        assert path.read_bytes() == data and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old"])
def test_publish_is_atomic(tmp_path, old, error):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error), storage.publish(path) as file:
        file.write(b"half")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == old
        raise error
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_publish_on_a_full_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=f"cannot write {path}: No space left"), storage.publish(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_unwritable_place_is_named(tmp_path):
    """Below a regular file not even root can write."""
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(UserError, match=f"cannot write {blocker / 'below'}: Not a directory"):
        storage.write_text(blocker / "below", "text")
    for directory in (blocker, blocker / "below"):
        with pytest.raises(UserError, match=f"cannot write to {directory}: "):
            storage.make_directory(directory)


def test_make_directory_leaves_no_trace(tmp_path):
    for _ in range(2):
        storage.make_directory(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_sealed_round_trip(tmp_path):
    path = tmp_path / "sealed.json"
    storage.write_sealed(path, VALUE)
    assert storage.read_sealed(path) == VALUE
    assert json.loads(json.loads(path.read_text())["content"]) == VALUE


@pytest.mark.parametrize("flips", [[1 << bit for bit in range(8)], [255]])
def test_sealed_notices_every_flipped_byte(tmp_path, flips):
    path = tmp_path / "sealed.json"
    storage.write_sealed(path, VALUE)
    good = path.read_bytes()
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] ^= flips[i % len(flips)]
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"sealed\.json is corrupt"):
            storage.read_sealed(path)


def test_sealed_notices_a_cut_at_any_place(tmp_path):
    path = tmp_path / "sealed.json"
    storage.write_sealed(path, VALUE)
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"sealed\.json is corrupt"):
            storage.read_sealed(path)


@pytest.mark.parametrize("change", [(b"\n", b"\r"), (b" ", b"\t"), (b"sha256", rb"\u0073ha256")])
def test_sealed_notices_what_json_would_not(tmp_path, change):
    path = tmp_path / "sealed.json"
    storage.write_sealed(path, VALUE)
    good = path.read_bytes()
    path.write_bytes(good.replace(*change, 1))
    assert path.read_bytes() != good and json.loads(path.read_bytes()) == json.loads(good)
    with pytest.raises(UserError, match=r"sealed\.json is corrupt.*; mend it"):
        storage.read_sealed(path, "mend it")


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"sha256": 1}', '{"content": 1}'])
def test_sealed_refuses_other_json(tmp_path, text):
    path = tmp_path / "sealed.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"sealed\.json is corrupt"):
        storage.read_sealed(path)


def test_sealed_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json is missing"):
        storage.read_sealed(tmp_path / "absent.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be read \(Is a directory\); restore it"):
        storage.read_sealed(tmp_path)


def test_a_directory_without_permission_is_named(tmp_path, monkeypatch):
    """Asked of the system, as the tests may run as root, who may do anything but on a read-only disk."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: no permission, or a read-only disk"):
        storage.make_directory(tmp_path)


def test_leftovers_are_what_a_kill_leaves_and_nothing_else(tmp_path):
    mine = [storage.temporary_beside(tmp_path / name) for name in ("file", "file", "set")]
    assert len({*mine}) == 3
    mine[2].mkdir()
    for path in (*mine[:2], mine[2] / "half"):
        path.touch()
    for name in (".hidden", ".file.tmp", "file.0123abcd.tmp", ".file.0123abcd.tmpx", ".file.0123abcg.tmp"):
        (tmp_path / name).touch()
    assert storage.leftovers(tmp_path) == sorted(mine)
    storage.remove_leftovers(tmp_path, "set")
    assert storage.leftovers(tmp_path) == sorted(mine[:2])
    storage.remove_leftovers(tmp_path)
    assert len(names(tmp_path)) == 5 and storage.leftovers(tmp_path / "nowhere") == []


def test_a_kill_in_publish_leaves_a_leftover(tmp_path, monkeypatch):
    """No ``finally`` runs: here the clearing itself is taken away."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "unlink", lambda *args: None)
        with storage.publish(tmp_path / "file"):
            exit()
    assert storage.leftovers(tmp_path) and names(tmp_path) == [storage.leftovers(tmp_path)[0].name]


def test_content_hash_covers_files_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "HASH_CHUNK", 4)
    for text in ("", "abc", "abcd", "abcdefghi"):
        (tmp_path / "file").write_text(text)
        assert storage.content_hash(tmp_path / "file") == storage.text_hash(text)
