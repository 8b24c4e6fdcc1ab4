"""Published laws by name, each with its source and with what its N counts.

Constants are those printed, and no more digits than these are known: Hoffmann's, as printed, fit their own
runs three times worse than unrounded ones would (Besiroglu et al. 2024).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from llm_jax.errors import UserError
from llm_jax.scaling.laws import repeated
from llm_jax.scaling.laws.isoflop import Frontier
from llm_jax.scaling.laws.power import Kaplan
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import FLOPS_PER

PF_DAY = 1e15 * 86400  # Kaplan's unit of compute, in FLOPs


@dataclass(frozen=True)
class Published:
    """law: has some of loss, optimum, frontier and a. counts: the parameters that N is."""

    law: Any
    source: str
    counts: str


def _kaplan_compute() -> Frontier:
    """N = 1.3e9 C^0.73 and L = (3.1e8 / C)^0.050, C in PF-days; tokens by C = 6 N D."""
    a, gamma = 0.73, 0.050
    G = 1.3e9 * PF_DAY**-a
    return Frontier(0.0, (3.1e8 * PF_DAY) ** gamma, gamma, G, a, 1 / (FLOPS_PER * G), 1 - a)


_MUENNIGHOFF = Surface(
    E=math.exp(0.6254804), A=math.exp(6.255414), B=math.exp(7.3049974), alpha=0.3526596, beta=0.3526596
)

LAWS = {
    "chinchilla": Published(
        Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
        "Hoffmann et al. 2022, arXiv 2203.15556, eq. 10: MassiveText, cosine",
        "all",
    ),
    "epoch": Published(
        Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "Besiroglu et al. 2024, arXiv 2404.10102: Hoffmann's runs read off a figure, but the 5 worst",
        "all",
    ),
    "kaplan": Published(
        Kaplan(Nc=6.4e13, Dc=1.8e13, alpha_N=0.076, alpha_D=0.103),
        "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5 and table 2: WebText2",
        "non-embedding",
    ),
    "kaplan-compute": Published(
        _kaplan_compute(),
        "Kaplan et al. 2020, arXiv 2001.08361, tables 5 and 6: C at a batch well below the critical one",
        "non-embedding",
    ),
    "muennighoff": Published(
        repeated.of(_MUENNIGHOFF),
        "Muennighoff et al. 2023, arXiv 2305.16264, appendix A: C4, repeated tokens",
        "all",
    ),
}


def law(name: str) -> Published:
    """Raises UserError, with the closest name, for one that is not here."""
    if name not in LAWS:
        close = difflib.get_close_matches(name, LAWS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(LAWS)}"
        raise UserError(f"no published law is called {name!r}; {hint}")
    return LAWS[name]
