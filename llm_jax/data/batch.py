"""What passes between the rooms: rows of tokens, and batches made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from flax import struct


class Rows(NamedTuple):
    """Rows as cut from the token stream, int32 [rows, length + 1]: one more than a model reads, so that
    every position has a next token. segments: which document, counted from 1 in each row; 0 is padding.
    positions: place in the document, counted from where it begins in the row.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


@struct.dataclass
class Batch:
    """What a step trains on, [batch, length] each: inputs, targets, positions and segments int32,
    weights float32 (0 where nothing is predicted).

    predict: int32 [batch, k], places in the row that hold every target, or None where all do. The loss is
    computed at these alone; a row with fewer targets is filled up with places of weight 0.
    """

    inputs: Any
    targets: Any
    weights: Any
    positions: Any
    segments: Any
    predict: Any = None
