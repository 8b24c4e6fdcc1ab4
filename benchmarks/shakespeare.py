"""The character configs on Shakespeare: three seeds of the decoder beside PyTorch's, and the encoder.

  python benchmarks/shakespeare.py --text=tinyshakespeare.txt

Runs scripts/train.py as a user would. The decoder's mean validation loss may be at most 0.01 above that in
benchmarks/results/shakespeare_torch.json (run shakespeare_torch.py first); the encoder's masked loss must be
at least 0.8 nats below the unigram entropy of the text. Writes benchmarks/results/shakespeare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from math import log
from pathlib import Path
from statistics import fmean

import record

from llm_jax.training import metrics

ROOT = record.HERE.parent


def train(
    config: str, text: str, seed: int, variables: Mapping[str, str] | None = None
) -> tuple[list, float]:
    """The story of a run, and its seconds as a whole process with these variables in its environment."""
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        flags = [f"--config={ROOT}/configs/{config}.py", f"--config.data.text={text}", f"--workdir={workdir}"]
        subprocess.run(
            [sys.executable, ROOT / "scripts" / "train.py", *flags, f"--config.seed={seed}"],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | dict(variables or {}),
        )
        return metrics.read(Path(workdir) / "metrics"), time.perf_counter() - start


def figures(config: str, text: str, seed: int) -> dict:
    """Final evaluation of a run, and its seconds."""
    story, seconds = train(config, text, seed)
    last = [r for r in story if r["kind"] == "evaluation"][-1]
    speeds = sorted(r["time"]["tokens_per_second"] for r in story if "tokens_per_second" in r.get("time", {}))
    return {
        "seed": seed,
        "validation_loss": last["loss"],
        "targets": last["targets"],
        "median_tokens_per_second": round(speeds[len(speeds) // 2]),
        "whole_seconds": round(seconds, 1),
    }


def unigram_entropy(text: str) -> float:
    """Nats a character: the loss of a model that knows only how often each character comes."""
    counts = Counter(Path(text).read_text(encoding="utf-8"))
    total = sum(counts.values())
    return -sum(n / total * log(n / total) for n in counts.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="tiny Shakespeare, one file")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    theirs = json.loads((record.HERE / "results" / "shakespeare_torch.json").read_text())
    decoders = []
    for seed in map(int, args.seeds.split(",")):
        decoders.append(figures("shakespeare_char_cpu", args.text, seed))
        print(decoders[-1], flush=True)
    encoder = figures("bert_char", args.text, 0)
    print(encoder)
    mean, entropy = fmean(run["validation_loss"] for run in decoders), unigram_entropy(args.text)
    result = {
        **record.environment("jax", "jaxlib", "flax", "optax", "numpy"),
        "decoder_runs": decoders,
        "decoder_mean": mean,
        "torch_mean": theirs["mean_validation_loss"],
        "difference": mean - theirs["mean_validation_loss"],
        "encoder": encoder,
        "unigram_entropy": entropy,
        "nats_below_unigram": entropy - encoder["validation_loss"],
    }
    print(f"decoder {mean:.4f}, torch {result['torch_mean']:.4f}: difference {result['difference']:+.4f}")
    print(f"encoder {result['nats_below_unigram']:.3f} nats below the unigram entropy {entropy:.4f}")
    record.write("shakespeare", result)
    sys.exit(0 if result["difference"] <= 0.01 and result["nats_below_unigram"] >= 0.8 else 1)


if __name__ == "__main__":
    main()
