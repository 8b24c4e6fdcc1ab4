"""All that storage does in a bucket, by gcsfs itself, against an emulator of Google Cloud Storage.

  pip install -e '.[gcs]' gcp-storage-emulator
  gcp-storage-emulator start --host 127.0.0.1 --port 9123 --in-memory --default-bucket bucket &
  STORAGE_EMULATOR_HOST=http://127.0.0.1:9123 python benchmarks/bucket_client.py

tests/storage/test_bucket.py holds the same against a stand-in that needs neither. What this adds: gcsfs
behaves as the stand-in does, in names, listings, ranges, uploads, copies, errors. Arrays are not among it:
tensorstore refuses the emulator, which gives objects no generation. Seen with gcsfs 2026.10.1 and
gcp-storage-emulator 2026.7.19.
"""

import logging
import os
from pathlib import Path

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.storage import bucket

NAMES = ["manifest.json", "x/1", "z/2"]


def main():
    assert os.environ.get("STORAGE_EMULATOR_HOST"), "see above: this is not for a real bucket"
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it looks for credentials
    root = storage.path("gs://bucket/client")
    for check in (absent, objects, ranges, log, directories, claims):
        check(root / check.__name__)
        print(f"{check.__name__}: as in the tests")


def absent(root: Path):
    assert not root.exists() and not root.is_dir() and storage.files(root) == []
    assert [*root.glob("*")] == [*root.glob("[0-9]*/manifest.json")] == storage.remembered(root) == []
    storage.remove_tree(root)
    for use in (storage.read_sealed, lambda path: storage.write_text(storage.path("gs://absent/x"), "")):
        assert "gs://" in refused(use, root / "file")


def objects(root: Path):
    for text in ("old", "new", ""):
        storage.write_text(root / "file", text)
        assert (root / "file").read_text() == text and storage.size(root / "file") == len(text)
    storage.write_sealed(root / "sealed", {"a": 1})
    assert storage.read_sealed(root / "sealed") == {"a": 1}


def ranges(root: Path):
    edge = bucket.RANGE_BYTES
    data = os.urandom(3 * edge + 100)
    with storage.publish(root / "file") as file:
        file.write(data)
    opened = storage.open_ranges(root / "file")
    assert opened.size == len(data)
    for begin, end in ((0, 10), (edge - 3, edge + 3), (5, len(data)), (len(data) - 4, len(data) + 4)):
        assert opened.read(begin, end) == data[begin:end]
    try:
        storage.open_ranges(root / "absent")
    except FileNotFoundError:
        return
    raise AssertionError("an absent object was opened")


def log(root: Path):
    bucket.PIECE_BYTES, lines = 100, [f"line {i}\n" for i in range(50)]
    opened = storage.open_log(root / "0001.jsonl")
    for line in lines:
        opened.write(line)
    opened.close()
    assert storage.read_log(root / "0001.jsonl") == "".join(lines)
    assert [path.name for path in root.glob("[0-9]*.jsonl")] == ["0001.jsonl"]


def directories(root: Path):
    with storage.publish_directory(root / "00000001", "manifest.json") as local:
        for name in NAMES:
            (local / name).parent.mkdir(exist_ok=True)
            (local / name).write_text(name)
    assert [*root.glob("[0-9]*/manifest.json")] == [root / "00000001" / "manifest.json"]
    assert [path.name for path in root.glob("*") if path.is_dir()] == ["00000001"]
    assert [*root.iterdir()] == [root / "00000001"]
    storage.duplicate(root / "00000001", root / "copy", "manifest.json")
    storage.set_aside(root / "copy", root / "aside", "manifest.json")
    assert storage.files(root / "aside") == [root / "aside" / name for name in NAMES]
    storage.remove_tree(root / "aside")
    assert not (root / "aside").exists() and not (root / "copy").exists()
    storage.remember(root, ["00000001"])
    assert storage.remembered(root) == ["00000001"]


def claims(root: Path):
    mine = storage.lock(root / ".lock")
    storage.write_text(root / "file", "mine")
    (root / ".lock").write_text("of a later start")
    assert "taken over" in refused(storage.write_text, root / "file", "late")
    mine.close()


def refused(use, *args):
    try:
        use(*args)
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


if __name__ == "__main__":
    main()
