"""What is measured: a table of training steps, each on the hardware that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_jax import cli
from llm_jax.training import experiment
from llm_jax.training.experiment import Experiment

ROOT = Path(__file__).resolve().parents[2]

PEERS = ("torch", "transformers")
# Shapes and mathematics that both sides have: no dropout, no biases, characters with a padded vocabulary.
PLAIN = {
    "data.markers": False,
    "data.validation": "position",
    "data.validation_fraction": 0.1,
    "evaluation.every": 0,
    "checkpoint.every": 0,
    "model.scan_layers": False,
}
DECODER = {"data.rows": "contiguous", "model.positions": "rotary", "model.norm": "rmsnorm"}
# As BERT has them, so that transformers' side has matrices of the same shapes; norms before the branches.
ENCODER = {"data.rows": "contiguous", "model.positions": "learnt", "model.norm": "layernorm"}
ENCODER |= {"model.activation": "gelu"}
LLAMA = DECODER | {"model.activation": "swiglu", "model.num_kv_heads": 8, "model.mlp_dim": 14_336}
TINY = {"global_batch_size": 4, "data.sequence_length": 32, "model.num_layers": 2, "model.num_heads": 2}
TINY |= {"model.model_dim": 32, "model.num_kv_heads": 2, "model.mlp_dim": 64, "model.vocab_size": 256}


@dataclass(frozen=True)
class Row:
    """platform: "cpu" or "gpu"; length, width, layers, heads, rows, vocabulary (0 = the characters'): of the
    model and its batch; steps: how many a round are timed, in groups of per_dispatch. memory: the share of a
    GPU's that ours may take, beside the peers; peers: those that fit there, and have such a model."""

    platform: str
    layers: int
    width: int
    heads: int
    length: int
    rows: int
    vocabulary: int = 0
    per_dispatch: int = 10
    steps: int = 50
    objective: str = "clm"
    changes: dict[str, Any] = field(default_factory=dict)
    memory: float = 0.5
    peers: tuple[str, ...] = PEERS

    def experiment(self, text: str, tiny: bool) -> Experiment:
        """Resolved; tiny: the same path at a shape for any machine."""
        config = experiment.default_config(objective=self.objective, tokenizer="char")
        changes = PLAIN | {
            "steps": 10 * self.steps,
            "data.text": (text,),
            "global_batch_size": self.rows,
            "steps_per_dispatch": self.per_dispatch,
            "data.sequence_length": self.length,
            "model.causal": self.objective == "clm",
            "model.num_layers": self.layers,
            "model.model_dim": self.width,
            "model.num_heads": self.heads,
            "model.vocab_size": self.vocabulary,
            **self.changes,
        }
        return experiment.resolve(experiment.override(config, changes | (TINY if tiny else {})))


def shape(e: Experiment) -> dict[str, Any]:
    """By what a result is known to be of the same step as another: all that the FLOPs and bytes hang on."""
    c = e.model
    return {
        "layers": c.num_layers,
        "width": c.model_dim,
        "heads": [c.num_heads, c.kv_heads],
        "mlp": c.mlp_size,
        "parts": [c.positions, c.norm, c.activation],
        "length": e.data.sequence_length,
        "rows": e.global_batch_size,
        "objective": "clm" if c.causal else "mlm",
    }


def shakespeare(**changes: Any) -> Row:
    """nanoGPT's CPU setting, as the shipped config has it."""
    config = cli.load_config(str(ROOT / "configs" / "shakespeare_char_cpu.py"))
    own = {f"model.{key}": config.model[key] for key in ("positions", "norm", "activation", "init_std")}
    row = {"layers": 4, "width": 128, "heads": 4, "length": 64, "rows": 12} | changes
    return Row("cpu", **row, changes=own | {"data.rows": "contiguous"})


ROWS = {
    "shakespeare_cpu": shakespeare(),
    # Several steps a dispatch: XLA takes its temporaries anew for each, a seventh of such a step (log).
    "shakespeare_cpu_larger": shakespeare(
        layers=6, width=384, heads=6, length=256, rows=16, per_dispatch=4, steps=8
    ),
    "124m": Row("gpu", 12, 768, 12, 1024, 64, 50_304, 5, changes=DECODER, memory=0.4),
    "1.3b": Row("gpu", 24, 2048, 16, 2048, 16, 50_304, 2, changes=DECODER, memory=0.9, peers=()),
    "8b_layers": Row("gpu", 8, 4096, 32, 4096, 4, 32_000, 2, changes=LLAMA, memory=0.9, peers=()),
    "bert_base": Row("gpu", 12, 768, 12, 512, 128, 30_522, 5, objective="mlm", changes=ENCODER, memory=0.3),
}
