"""Stand-ins for programs that are not here."""

import os

import pytest


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a bash script of a name before all others in the PATH; ``log`` is where they say what they were
    asked."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))

    def make(name, body):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    return make
