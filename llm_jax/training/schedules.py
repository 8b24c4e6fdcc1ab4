"""Learning rate as a function of the number of updates made."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from llm_jax.config import identity


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from peak / (warmup_steps + 1), then a half cosine to ``end_ratio * peak`` at the
    last step (Loshchilov and Hutter 2016, arXiv 1608.03983)."""

    warmup_steps: int = identity(20)
    end_ratio: float = identity(0.1)

    def build(self, peak: float, steps: int) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=peak / (self.warmup_steps + 1),
            peak_value=peak,
            warmup_steps=self.warmup_steps,
            decay_steps=steps,
            end_value=self.end_ratio * peak,
        )


SCHEDULES = {"cosine": WarmupCosine}
