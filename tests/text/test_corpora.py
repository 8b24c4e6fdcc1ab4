import sys

import pytest

from llm_jax.errors import UserError
from llm_jax.text import corpora


def texts(*sources):
    return [document.text for document in corpora.read(sources)]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md", ".hidden.txt", ".git/e.txt", "sub/.f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_file_directory_and_glob(tree):
    assert texts(str(tree / "a.txt")) == ["a.txt"]
    assert texts(str(tree)) == ["a.txt", "b.txt", "sub/c.txt", "sub/d.md"]
    assert texts(str(tree / "*.txt")) == ["a.txt", "b.txt"]
    assert texts(str(tree / "**" / "*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(str(tree / "b.txt"), str(tree / "sub")) == ["b.txt", "sub/c.txt", "sub/d.md"]


def test_directory_inside_a_hidden_one_is_read(tree):
    assert texts(str(tree / ".git")) == [".git/e.txt"]


def test_documents_are_named_by_their_file(tree):
    assert [d.name for d in corpora.read([str(tree / "sub")])] == [
        str(tree / "sub" / "c.txt"),
        str(tree / "sub" / "d.md"),
    ]


def test_text_in_a_bucket_is_refused():
    with pytest.raises(UserError, match=r"data\.text=gs://bucket/text: text is read from a disk; copy it"):
        corpora.find("gs://bucket/text")


@pytest.mark.parametrize("name", ["absent.txt", "absent/", "*.absent", "empty"])
def test_nothing_found(tree, name):
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=f"data.text={tree / name}".replace("*", r"\*")):
        texts(str(tree / name))


def test_empty_file_is_named(tree):
    (tree / "nothing.txt").touch()
    with pytest.raises(UserError, match=r"nothing\.txt is empty"):
        texts(str(tree))


def test_text_that_is_not_utf8_is_named(tree):
    (tree / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 \(byte 0xef at offset 2\)"):
        texts(str(tree))


def test_unknown_embedded_corpus():
    with pytest.raises(UserError, match="python:tests: there are python:source and python:docs"):
        texts("python:tests")


def test_python_source_has_the_library_without_its_tests():
    documents = list(corpora.read(["python:source"]))
    names = [document.name for document in documents]
    assert names == sorted(names, key=lambda name: name.split("/")) and len(names) > 300
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    assert not {part for name in names for part in name.split("/")} & corpora.LEFT_OUT
    assert not [name for name in names if "topics.py" in name]  # that is python:docs
    assert all(document.text.strip() and "\r\n" not in document.text for document in documents)


def test_python_source_leaves_out_what_is_not_the_library(tmp_path, monkeypatch):
    kept = ["b.py", "json/a.py"]
    left = [
        "test/a.py",
        "json/tests/a.py",
        "idlelib/a.py",
        "site-packages/a.py",
        "pydoc_data/topics.py",
        "a.txt",
    ]
    for name in (*kept, *left):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"x = '\xff'\r\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=f"python:source: this Python ships 2 source files in {tmp_path}"):
        texts("python:source")
    monkeypatch.setattr(corpora, "FEWEST_SOURCES", 2)
    assert list(corpora.read(["python:source"])) == [(name, "x = ''\n") for name in kept]


def test_python_docs_are_the_language_reference():
    documents = dict(corpora.read(["python:docs"]))
    assert len(documents) > 50 and list(documents) == sorted(documents)
    assert "comprehension" in documents["lists"]


def test_python_without_its_docs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="python:docs: this Python has no pydoc_data"):
        texts("python:docs")


def test_hash_is_of_the_texts_in_order_and_of_where_they_end():
    def digest(*texts):
        hasher = corpora.Hasher()
        for text in texts:
            hasher.add(text)
        return hasher.hexdigest()

    assert digest("a", "bc") == digest("a", "bc")
    assert len({digest("a", "bc"), digest("ab", "c"), digest("bc", "a"), digest("abc"), digest()}) == 5
