"""Tokens a second from shards to batches: packed rows of 1,024 tokens, on two cores.

  python benchmarks/data_throughput.py
  python benchmarks/data_throughput.py --text=my_texts/

Makes a shard set of the text (default: Python's own source) with the byte tokenizer, and reads it through
TrainBatches: "host" is one thread that makes batches in numpy, "run" is what a training loop is given, read
ahead by a thread and placed on the device. Each is the median of --repeats; the first pass, in which blocks
are checked against their CRC, is given apart. Exits 1 when a decoder's batches come at less than 2 million
tokens a second. Writes benchmarks/results/data_throughput.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import jax
import record

from llm_jax.data.loader import TrainBatches
from llm_jax.data.mixture import Mixture
from llm_jax.data.packing import pack
from llm_jax.data.source import TokenSource
from llm_jax.mesh import MeshConfig, make_layout
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM
from llm_jax.text.prepare import load_tokenizer, prepare
from llm_jax.text.sources import DataConfig
from llm_jax.text.tokenizers import ByteConfig
from llm_jax.text.words import Vocabulary

LENGTH, ROWS, CORES = 1024, 64, 2
REQUIRED = 2e6


def rate(batches: TrainBatches, count: int, how: str, first: int) -> float:
    """Tokens a second over ``count`` dispatches from number ``first``."""
    began = time.perf_counter()
    if how == "host":
        for i in range(first, first + count):
            batches.host(i)
    else:
        for batch in batches.iterate(first, first + count):
            jax.block_until_ready(batch)
    return count * ROWS * LENGTH / (time.perf_counter() - began)


def measure(directory: Path, repeats: int, count: int) -> dict[str, dict[str, int]]:
    """{what: {first pass, host, run}} in tokens a second."""
    sharding = make_layout(MeshConfig(), jax.devices()[:1]).named(None, None, "batch")
    vocabulary = Vocabulary.of(load_tokenizer(directory))
    kinds = {"clm": CLM(), "mlm": MLM(), "mlm_whole_words": MLM(unit="word"), "clm_mixture": CLM()}
    results = {}
    for name, objective in kinds.items():
        rows = pack(TokenSource(directory, "train"), "packed", LENGTH)
        if name == "clm_mixture":
            other = pack(TokenSource(directory, "validation"), "packed", LENGTH)
            rows = Mixture(["a", "b"], [rows, other], [0.7, 0.3], [0, 0])
        to_batch = partial(objective.to_batch, seed=0, vocabulary=vocabulary)
        batches = TrainBatches(rows, to_batch, 0, (1, 1, ROWS), sharding)
        result = {"first_pass": rate(batches, count, "host", 0)}
        for how in ("host", "run"):
            result[how] = median(rate(batches, count, how, count * (i + 1)) for i in range(repeats))
        results[name] = {key: round(value) for key, value in result.items()}
        print(name, *(f"{key} {value / 1e6:.2f} M" for key, value in results[name].items()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="python:source", help="a file, directory, glob or python: corpus")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dispatches", type=int, default=40, help="of 64 rows, in each repeat")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    jax.config.update("jax_platforms", "cpu")
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as root:
        header = prepare(DataConfig(text=(args.text,)), ByteConfig(), Path(root) / "data", print)
        results = measure(Path(root) / "data", args.repeats, args.dispatches)
    slowest = min(results["clm"]["host"], results["clm"]["run"])
    content = {
        **record.environment("jax", "numpy", "grain"),
        "cores": CORES,
        "text": args.text if args.text.startswith("python:") else "the user's own",
        "train_tokens": header["splits"]["train"]["tokens"],
        "documents": header["splits"]["train"]["documents"],
        "length": LENGTH,
        "rows_of_a_dispatch": ROWS,
        "load_average_before": load,
        "tokens_per_second": results,
        "required": REQUIRED,
        "passed": slowest >= REQUIRED,
    }
    record.write("data_throughput", content)
    sys.exit(0 if content["passed"] else 1)


if __name__ == "__main__":
    main()
