"""What is known to need fewer tokens than GPT-2's recipe, as one set of changes to any config of a decoder.

``configs/sweep_modern.py`` measures it, and each part of it, against AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# After the records of training GPT-2 fast (Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt). One
# learning rate serves all: Muon's updates have the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).
MODERN: Mapping[str, Any] = MappingProxyType(
    {
        "model.positions": "rotary",
        "model.norm": "rmsnorm",
        "model.activation": "relu2",
        "model.qk_norm": True,
        "model.zero_init": True,
        "model.value_residual": True,
        "model.tied_head": False,
        "model.logit_softcap": 15.0,
        "optimizer.name": "muon",
        "schedule.name": "wsd",
        "schedule.decay_share": 0.4,
        "schedule.decay": "linear",
    }
)
