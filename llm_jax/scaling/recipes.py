"""What a run of a ladder is trained with, by its size and its tokens: rate, batch, warm-up, transfer.

The rule matters more than the fit: with a rate that suits one end of a ladder alone, its losses lie on a
clean line that leads elsewhere. So a recipe has a name, and what is published is cited (laws/tuning.py,
training/transfer.py). N is here without embeddings, with the head, as rules of the rate mostly count it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_jax.models.config import ModelConfig
from llm_jax.models.flops import matmul_parameters
from llm_jax.scaling.laws import tuning
from llm_jax.training.experiment import Experiment
from llm_jax.training.transfer import transfer


@dataclass(frozen=True)
class Recipe:
    """rule: of rate and batch, None = the config's own. transfer: of the rate from the config's shape to
    another. tuned_tokens: at which the config's rate is best, for longer and shorter runs to take (T0/T)^0.3
    of it; 0 = it stays. warmup: in tokens for each parameter, 0 = the config's steps. multiple: of rows,
    which devices and micro-batches must share."""

    rule: tuning.Rule | None = None
    transfer: str = "standard"
    tuned_tokens: float = 0.0
    warmup: float = 0.0
    multiple: int = 1

    def overrides(self, base: Experiment, model: ModelConfig, tokens: float) -> dict[str, Any]:
        """What of ``base`` changes for a model of another shape and so many tokens: {dotted key: value}."""
        params, length = matmul_parameters(model), base.data.sequence_length
        changes = transfer(self.transfer, model, base.model)
        rows, rate = base.global_batch_size, base.optimizer.learning_rate
        if self.rule:
            wanted = self.rule.batch_tokens(params, tokens) / (length * self.multiple)
            rows = max(1, round(wanted)) * self.multiple
            rate = self.rule.rate(params, tokens, rows * length)
            changes["global_batch_size"] = rows
        if self.tuned_tokens:
            rate = tuning.horizon(rate, self.tuned_tokens, tokens)
        if rate != base.optimizer.learning_rate:
            changes["optimizer.learning_rate"] = float(f"{rate:.4g}")
        if self.warmup:
            changes["schedule.warmup_steps"] = max(1, round(self.warmup * params / (rows * length)))
        return changes


RECIPES = {
    "config": Recipe(),
    **{name: Recipe(rule) for name, rule in tuning.RULES.items()},
    "olmo-ladder": Recipe(tuning.RULES["olmo-ladder"], warmup=1.0),
    "mup": Recipe(transfer="mup"),
    "completep": Recipe(transfer="completep"),
}
