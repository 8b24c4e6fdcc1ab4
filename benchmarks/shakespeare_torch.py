"""nanoGPT's CPU setting in plain PyTorch: what configs/shakespeare_char_cpu.py should reach.

  python benchmarks/shakespeare_torch.py --text=tinyshakespeare.txt --seeds=0,1,2 --compile

The same model, initialisation, optimiser and schedule, read from that config; batches are windows at random
offsets, as nanoGPT draws them. The loss is over the whole validation split in non-overlapping windows, every
target once. Needs torch; writes benchmarks/results/shakespeare_torch.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import record
import torch
from peers import torch_transformer as peer
from torch import Tensor

from llm_jax import cli
from llm_jax.text.tokenizers import CharTokenizer
from llm_jax.training import experiment as experiments
from llm_jax.training.experiment import Experiment

CONFIG = record.HERE.parent / "configs" / "shakespeare_char_cpu.py"
EVALUATION_ROWS = 120


def read_splits(text_file: str, validation_fraction: float) -> tuple[Tensor, Tensor, int]:
    """Ids of the first and of the last part of the text, and the vocabulary of the first."""
    text = Path(text_file).read_text(encoding="utf-8")
    cut = int(len(text) * (1 - validation_fraction))
    tokenizer = CharTokenizer(text[:cut])
    train, validation = (torch.tensor(tokenizer.encode(part)).long() for part in (text[:cut], text[cut:]))
    return train, validation, tokenizer.vocab_size


def draw_batch(ids_n: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length] at random offsets."""
    offsets = torch.randint(len(ids_n) - length, (rows,)).tolist()
    windows = torch.stack([ids_n[i : i + length + 1] for i in offsets])
    return windows[:, :-1], windows[:, 1:]


def make_loss(model: peer.Transformer):
    """(inputs, targets) -> mean loss over all of them."""

    def loss(inputs_bl: Tensor, targets_bl: Tensor) -> Tensor:
        logits_blv = model.logits(model(inputs_bl))
        return torch.nn.functional.cross_entropy(logits_blv.flatten(0, 1), targets_bl.flatten())

    return loss


def train(
    e: Experiment, ids_n: Tensor, seed: int, steps: int, compiled: bool
) -> tuple[peer.Transformer, dict]:
    """A trained model, and what it cost. The first step, which compiles, is counted apart."""
    torch.manual_seed(seed)
    model = peer.Transformer(e.model)
    optimizer = peer.adamw(model, e.optimizer)
    loss_fn = torch.compile(make_loss(model)) if compiled else make_loss(model)
    s, peak = e.schedule, e.optimizer.learning_rate
    start = time.perf_counter()
    for i in range(steps):
        loss = loss_fn(*draw_batch(ids_n, e.global_batch_size, e.data.sequence_length))
        rate = peer.learning_rate(i, peak, s.warmup_steps, s.end_ratio, e.steps)
        peer.update(optimizer, loss, rate, e.optimizer.clip_norm)
        if i == 0:
            first = time.perf_counter()
    seconds = time.perf_counter() - start
    later = (time.perf_counter() - first) / max(steps - 1, 1)
    return model, {
        "train_seconds": round(seconds, 2),
        "first_step_seconds": round(first - start, 2),
        "ms_per_later_step": round(1000 * later, 2),
    }


@torch.no_grad()
def evaluate(model: peer.Transformer, ids_n: Tensor, length: int) -> tuple[float, int]:
    """Mean loss over every target of the split, in windows of ``length``, and how many there are."""
    loss_fn, inputs_n, targets_n = make_loss(model), ids_n[:-1], ids_n[1:]
    whole = len(inputs_n) // length * length
    windows = zip(
        inputs_n[:whole].view(-1, length).split(EVALUATION_ROWS),
        targets_n[:whole].view(-1, length).split(EVALUATION_ROWS),
        strict=True,
    )
    rest = (inputs_n[None, whole:], targets_n[None, whole:])  # the last window, shorter
    pairs = [pair for pair in (*windows, rest) if pair[0].numel()]
    total = math.fsum(loss_fn(*pair).item() * pair[0].numel() for pair in pairs)
    count = sum(pair[0].numel() for pair in pairs)
    assert count == len(ids_n) - 1
    return total / count, count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="tiny Shakespeare, one file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--steps", type=int, default=0, help="stop after so many, as a trial; 0 = the config's"
    )
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    args = parser.parse_args()
    config = experiments.override(cli.load_config(str(CONFIG)), {"data.text": (args.text,)})
    e = experiments.resolve(config)
    train_ids, validation_ids, vocab_size = read_splits(args.text, e.data.validation_fraction)
    e = experiments.complete(e, vocab_size)
    steps, seeds = args.steps or e.steps, [int(seed) for seed in args.seeds.split(",")]
    runs = []
    for seed in seeds:
        model, cost = train(e, train_ids, seed, steps, args.compile)
        loss, targets = evaluate(model, validation_ids, e.data.sequence_length)
        runs.append({"seed": seed, "validation_loss": loss, **cost})
        print(f"seed {seed}: validation loss {loss:.4f}, {cost['train_seconds']:.1f} s", flush=True)
    mean = statistics.fmean(run["validation_loss"] for run in runs)
    print(f"mean of {len(runs)}: {mean:.4f} over {targets:,} targets, {steps} of {e.steps} steps")
    result = {
        **record.environment("torch"),
        "threads": torch.get_num_threads(),
        "compiled": args.compile,
        "steps": steps,
        "targets": targets,
        "mean_validation_loss": mean,
        "runs": runs,
    }
    if steps == e.steps:
        record.write("shakespeare_torch", result)
    else:
        print("not written: a shortened run is no result")


if __name__ == "__main__":
    cli.main(main)
