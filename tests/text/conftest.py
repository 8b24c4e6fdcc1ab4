"""A folder of documents, and a disk that fills up."""

import resource
from contextlib import contextmanager

import pytest
from prepared import TEXTS


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i:03d}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def full_disk():
    """A context in which no file of this process grows beyond so many bytes: a write fails as it does on a
    full disk, but for the number of the error."""

    @contextmanager
    def limited(after):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
