"""What a run of a ladder is trained with, from its size and its tokens: rate, batch, warm-up, transfer.

The rule matters more than the fit: with a rate that suits one end of a ladder alone, its losses lie on a
clean line that leads elsewhere. So a recipe is named, and cited where it is published (laws/tuning.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_jax.models.flops import matmul_parameters
from llm_jax.models.transformer import ModelConfig
from llm_jax.training.experiment import Experiment
from llm_jax.training.transfer import transfer

Rule = Callable[[float, float], float]  # (N, the parameters of matrix products; D, tokens) -> a value


@dataclass(frozen=True)
class Recipe:
    """rate: of learning; batch: tokens, rounded to whole rows; warmup: tokens. None leaves what the config
    says. transfer: to a shape from the config's own, by training/transfer.py; the rate is then the base's.
    multiple: of rows, which devices and micro-batches must share."""

    rate: Rule | None = None
    batch: Rule | None = None
    warmup: Rule | None = None
    transfer: str = "standard"
    multiple: int = 1

    def overrides(self, base: Experiment, model: ModelConfig, tokens: float) -> dict[str, Any]:
        """What of ``base`` changes for a model of another shape and so many tokens."""
        params, length = matmul_parameters(model), base.data.sequence_length
        changes = transfer(self.transfer, model, base.model)
        rows = base.global_batch_size
        if self.batch:
            rows = max(1, round(self.batch(params, tokens) / (length * self.multiple))) * self.multiple
            changes["global_batch_size"] = rows
        if self.rate:
            changes["optimizer.learning_rate"] = float(f"{self.rate(params, tokens):.4g}")
        if self.warmup:
            changes["schedule.warmup_steps"] = max(1, round(self.warmup(params, tokens) / (rows * length)))
        return changes
