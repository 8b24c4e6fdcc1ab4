"""The same step in PyTorch, in a process of its own; benchmarks/speed/run.py starts it. On a GPU with the
choice that benchmarks/speed/tune.py found to be the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import torch_transformer as peer
from benchmarks.speed import clock
from benchmarks.speed.choice import Choice
from benchmarks.speed.rows import ROWS
from llm_jax.training import experiment
from llm_jax.training.experiment import Experiment

BATCHES = 16  # made beforehand, so that the loader costs nothing
CUDA = torch.cuda.is_available()
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Step:
    """Forward, backward, clipping, AdamW."""

    def __init__(self, e: Experiment, choice: Choice) -> None:
        device = "cuda" if CUDA else "cpu"
        torch.manual_seed(0)
        self.e, self.choice, self.number = e, choice, 0
        model = peer.Transformer(e.model).to(device)
        self.masters = model
        self.model = (
            peer.Transformer(e.model).to(device, torch.bfloat16) if choice.weights == "bfloat16" else model
        )
        self.optimizer = peer.adamw(model, e.optimizer)
        shape = (BATCHES, choice.parts, e.global_batch_size // choice.parts, e.data.sequence_length)
        self.inputs, self.targets = (
            torch.randint(0, e.model.vocab_size, shape, device=device) for _ in range(2)
        )
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, mode=choice.mode)
        self.run = self.loss if choice.mode == "eager" else compiled(self.loss)

    def loss(self, inputs_bl: torch.Tensor, targets_bl: torch.Tensor) -> torch.Tensor:
        e = self.e
        cast = CUDA and self.choice.weights == "float32"
        with torch.autocast("cuda", torch.bfloat16) if cast else contextlib.nullcontext():
            hidden = self.model(inputs_bl)
            if not e.model.causal:  # the first so many of a row: which ones makes no difference to the time
                predicted = e.objective.targets_of_row(targets_bl.shape[-1])
                hidden, targets_bl = hidden[:, :predicted], targets_bl[:, :predicted]
            logits = self.model.logits(hidden)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets_bl.flatten())

    def __call__(self) -> torch.Tensor:
        """One update; gives the loss, on the device."""
        backend, parts = BACKENDS.get(self.choice.attention), self.choice.parts
        self.optimizer.zero_grad()
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            for part in range(parts):
                i = self.number % BATCHES
                loss = self.run(self.inputs[i, part], self.targets[i, part])
                (loss / parts).backward()
        if self.model is not self.masters:
            for master, p in zip(self.masters.parameters(), self.model.parameters(), strict=True):
                master.grad, p.grad = p.grad.float(), None
        c = self.e.optimizer
        torch.nn.utils.clip_grad_norm_(list(self.masters.parameters()), c.clip_norm)
        self.optimizer.step()
        if self.model is not self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), list(self.masters.parameters()))
        self.number += 1
        return loss

    def group(self, size: int) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(size):
                loss = self()
            loss.item()  # waits

        return steps


def main(name: str, text: str, tiny: bool, steps: int, choice: Choice) -> None:
    row = ROWS[name]
    e = row.experiment(text, tiny)
    e = experiment.complete(e, e.model.vocab_size or 68)
    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    gc.disable()
    step = Step(e, choice)
    size = min(row.per_dispatch, steps or row.steps)
    group = step.group(size)
    about = {"choice": dataclasses.asdict(choice), "threads": torch.get_num_threads()}

    def first() -> None:
        group()
        torch.cuda.empty_cache()  # for the other sides, until it is this one's turn

    def measure() -> dict[str, Any]:
        ms = clock.milliseconds(group, size, steps or row.steps)
        memory = torch.cuda.max_memory_allocated() if CUDA else clock.peak_memory()
        torch.cuda.empty_cache()
        return about | {"ms": ms, "peak_bytes": memory}

    clock.serve(measure, first)


if __name__ == "__main__":
    choice = Choice(**json.loads(sys.argv[5]))
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]), choice)
