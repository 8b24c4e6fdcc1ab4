"""Whether both sides of a row are the same mathematics, in float32 from equal weights: exit code 0 if so."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

from benchmarks import parity
from benchmarks.speed import clock
from benchmarks.speed.rows import ROWS

STEPS = 5


def main(name: str, text: str, tiny: bool) -> None:
    e = ROWS[name].experiment(text, tiny)
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, dtype="float32"))
    with tempfile.TemporaryDirectory() as directory:
        clock.give(parity.compare(e, STEPS, Path(directory)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny")
