"""When a run should end before its last step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_jax.training import metrics


def at_the_end(story: list[metrics.Record], steps: int, patience: int) -> bool:
    """Whether a run of so many steps, whose process ended by itself, has nothing left to do. One that was
    killed may only lack its last checkpoint."""
    newest = next((record for record in reversed(story) if record["kind"] == "train"), {})
    losses = [record["loss"] for record in metrics.evaluations(story)]
    return newest.get("step") == steps or out_of_patience(losses, patience)


def out_of_patience(losses: Sequence[float | None], patience: int) -> bool:
    """Whether the last ``patience`` evaluations, at least, brought no loss below the best before them.

    losses: validation losses from the beginning of the run, None or NaN for one that is not finite, which
    is never an improvement. patience 0 = never. A function of the run's story alone, so that a run that
    was stopped by other means and goes on decides as if it had not been.
    """
    if not patience or not losses:
        return False
    known = [loss if loss is not None and math.isfinite(loss) else math.inf for loss in losses]
    return len(known) - 1 - known.index(min(known)) >= patience
