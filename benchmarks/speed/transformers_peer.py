"""The same shape as users of transformers meet it: GPT-2 or BERT with sdpa, in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers

from benchmarks.speed import clock
from benchmarks.speed.rows import ROWS
from llm_jax.models.config import ModelConfig
from llm_jax.training import experiment


def build(c: ModelConfig) -> transformers.PreTrainedModel:
    """Without dropout, as every side here."""
    if c.causal:
        config = transformers.GPT2Config(
            vocab_size=c.padded_vocab,
            n_positions=c.max_length,
            n_embd=c.model_dim,
            n_layer=c.num_layers,
            n_head=c.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=c.padded_vocab,
        hidden_size=c.model_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        intermediate_size=c.mlp_size,
        max_position_embeddings=c.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return transformers.BertForMaskedLM(config)


def main(name: str, text: str, tiny: bool, steps: int, mode: str) -> None:
    row = ROWS[name]
    e = row.experiment(text, tiny)
    e = experiment.complete(e, e.model.vocab_size or 68)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    gc.disable()
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    model = build(e.model).to(device).train()
    run = model if mode == "eager" else torch.compile(model, dynamic=False, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=e.optimizer.learning_rate, fused=True)
    cast = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    tokens = torch.randint(
        0, e.model.vocab_size, (e.global_batch_size, e.data.sequence_length), device=device
    )

    def group() -> None:
        for _ in range(row.per_dispatch):
            with cast:
                loss = run(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), e.optimizer.clip_norm)
            optimizer.step()
        loss.item()  # waits

    def first() -> None:
        group()
        torch.cuda.empty_cache()  # for the other sides, until it is this one's turn

    def measure() -> dict[str, Any]:
        ms = clock.milliseconds(group, row.per_dispatch, steps or row.steps)
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else clock.peak_memory()
        torch.cuda.empty_cache()
        return {"ms": ms, "peak_bytes": memory}

    clock.serve(measure, first)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]), sys.argv[5])
