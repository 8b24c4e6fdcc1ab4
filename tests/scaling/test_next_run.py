"""The most telling run: checked by making it."""

import numpy as np
import pytest
from tables import TRUTH, Runs, isoflop_runs

from llm_jax.errors import UserError
from llm_jax.scaling import next_run
from llm_jax.scaling.laws import isoflop, resample, tied

TARGET, NOISE = 1e18, 0.003


def spread(runs, seed):
    law = tied.fit(runs)
    drawn = resample.resample(law, runs, tied.refit, repeats=400, seed=seed)
    return law, drawn, np.std(np.log(drawn.frontier(TARGET)))


def test_what_it_says_is_left_is_what_is_left():
    runs = isoflop_runs(noise=NOISE)
    law, drawn, before = spread(runs, 0)
    found = next_run.candidates(law, drawn, TARGET, NOISE)
    assert [c.flops for c in found] == pytest.approx([share * TARGET for share in next_run.SHARES])
    lefts = [c.left for c in found]
    assert lefts == sorted(lefts, reverse=True) and 0 < lefts[-1] < lefts[0] <= 1  # a dearer run tells more
    c = found[-1]
    assert 6 * c.params * c.tokens == pytest.approx(c.flops)
    loss = float(TRUTH.loss(c.params, c.tokens))
    new = Runs(
        *(
            np.append(getattr(runs, name), value)
            for name, value in (
                ("params", c.params),
                ("tokens", c.tokens),
                ("flops", c.flops),
                ("loss", loss),
            )
        )
    )
    assert spread(new, 1)[2] / before == pytest.approx(c.left, abs=0.2)
    assert spread(new, 1)[2] < before


def test_a_law_that_cannot_tell():
    runs = isoflop_runs(noise=NOISE)
    for law, drawn in ((tied.fit(runs), None), (isoflop.fit(runs), isoflop.fit(runs))):
        with pytest.raises(UserError, match="a surface with resamples"):
            next_run.candidates(law, drawn, TARGET, NOISE)
