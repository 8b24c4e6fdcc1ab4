"""The splits of a shard set as rows, cut and mixed as a config says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llm_jax.data import packing
from llm_jax.data.mixture import Mixture
from llm_jax.data.packing import Contiguous, Filled, OneDocument
from llm_jax.data.source import TokenSource
from llm_jax.errors import UserError
from llm_jax.text import shards
from llm_jax.text.sources import DataConfig

Cut = Contiguous | OneDocument
Drawn = Cut | Filled | Mixture


@dataclass(frozen=True)
class Splits:
    """directory: the shard set. A split is opened when it is first asked for, and stays open. filled: whether
    training rows are without padding (``packing.Filled``)."""

    directory: Path
    config: DataConfig
    filled: bool = False

    @cached_property
    def _open(self) -> dict[str, Cut]:
        return {}

    def rows(self, split: str) -> Cut:
        """The rows of one split. Raises UserError when it is not there or damaged."""
        if split not in self._open:
            source = TokenSource(self.directory, split)
            self._open[split] = packing.pack(source, self.config.rows, self.config.sequence_length)
        return self._open[split]

    @cached_property
    def training(self) -> Drawn:
        """What a run trains on."""
        sources = self.config.mixture
        rows = [self.rows(shards.split_name(shards.TRAIN, source.name)) for source in sources]
        rows = [Filled(them) for them in rows] if self.filled else rows
        if not self.config.sources:
            return rows[0]
        names, weights = [source.name for source in sources], [source.weight for source in sources]
        return Mixture(names, rows, weights, [source.max_epochs for source in sources])

    def check_epochs(self, steps: int, rows_per_step: int) -> None:
        """Raises UserError when the sources' epochs allow less than a run needs."""
        if not any(source.max_epochs for source in self.config.sources):
            return
        limit, needed = self.training.limit, steps * rows_per_step
        if limit is not None and needed > limit:
            raise UserError(
                f"config.steps={steps} x global_batch_size={rows_per_step} needs {needed:,} rows, but "
                f"{self.training.allowance()}; raise max_epochs, or take {limit // rows_per_step:,} steps"
            )

    @property
    def validation(self) -> dict[str, float]:
        """{validation split: its source's share of the training rows, by weight}."""
        total = sum(source.weight for source in self.config.mixture)
        name = shards.split_name
        return {name(shards.VALIDATION, s.name): s.weight / total for s in self.config.mixture}

    def bytes_per_target(self, split: str) -> float:
        """UTF-8 bytes of text for each token that a decoder predicts, over the whole split.

        The marker that ends a document is predicted, and so costs bits. The one that begins it is not,
        where segments keep documents apart.
        """
        source = self.rows(split).source
        begun = len(source.ends) if self.config.markers and self.config.rows in ("packed", "document") else 0
        return source.text_bytes / (source.tokens - begun)
