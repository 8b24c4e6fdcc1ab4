"""The same step in PyTorch, in a process of its own; benchmarks/speed/run.py starts it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from benchmarks.peers import torch_transformer as peer
from benchmarks.speed import clock
from benchmarks.speed.rows import ROWS
from llm_jax.training import experiment

BATCHES = 16  # made beforehand, so that the loader costs nothing


def main(name: str, text: str, tiny: bool, steps: int, mode: str) -> None:
    """mode: "eager", or a mode of torch.compile."""
    row = ROWS[name]
    e = row.experiment(text, tiny)
    e = experiment.complete(e, e.model.vocab_size or 68)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    model = peer.Transformer(e.model).to(device)
    optimizer = peer.adamw(model, e.optimizer)
    shape = (BATCHES, e.global_batch_size, e.data.sequence_length)
    inputs, targets = (torch.randint(0, e.model.vocab_size, shape, device=device) for _ in range(2))
    predicted = 0 if e.model.causal else e.objective.targets_of_row(shape[-1])
    cast = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def loss_fn(inputs_bl: torch.Tensor, targets_bl: torch.Tensor) -> torch.Tensor:
        with cast:
            hidden = model(inputs_bl)
            if predicted:  # the first so many of a row: which ones makes no difference to the time
                hidden, targets_bl = hidden[:, :predicted], targets_bl[:, :predicted]
            logits = model.logits(hidden)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets_bl.flatten())

    run = loss_fn if mode == "eager" else torch.compile(loss_fn, fullgraph=True, dynamic=False, mode=mode)
    gc.disable()
    size, number = row.per_dispatch, 0

    def group() -> None:
        nonlocal number
        for _ in range(size):
            i = number % BATCHES
            loss = run(inputs[i], targets[i])
            peer.update(optimizer, loss, e.optimizer.learning_rate, e.optimizer.clip_norm)
            number += 1
        loss.item()  # waits

    out = clock.measure(group, size, steps or row.steps)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else clock.peak_memory()
    clock.give(out | {"peak_bytes": memory, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]), sys.argv[5])
