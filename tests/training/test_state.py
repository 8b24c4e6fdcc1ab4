"""What a state may carry survives being saved: routed optimisers, the running mean, the loss scale."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from llm_jax.errors import Stopped
from llm_jax.training import experiment, loop, metrics
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.program import Program
from llm_jax.training.signals import Stop

pytestmark = pytest.mark.slow

CHANGES = {
    "steps": 20,
    "steps_per_dispatch": 5,
    "data.validation": "position",
    "data.sequence_length": 16,
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.dtype": "float16",
    "samples.tokens": 2,
    "optimizer.name": "muon",
    "schedule.warmup_steps": 2,
    "ema_decay": 0.9,
    "loss_scale.initial": 2.0**24,  # so high that the first steps are skipped
}


@pytest.fixture
def muon(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 60)
    config = experiment.override(experiment.default_config(), CHANGES | {"data.text": (str(text),)})
    return experiment.resolve(config)


def test_all_of_it_goes_on_bit_for_bit(muon, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loop.run(muon, whole)
    stop, steps = Stop(), Program.steps

    def asked(self, state, batches):
        stop.signal = signal.SIGTERM
        return steps(self, state, batches)

    monkeypatch.setattr(Program, "steps", asked)
    with pytest.raises(Stopped):
        loop.run(muon, cut, stop=stop)
    monkeypatch.setattr(Program, "steps", steps)
    loop.run(muon, cut)
    story = metrics.read(whole / "metrics")
    assert metrics.without_time(story) == metrics.without_time(metrics.read(cut / "metrics"))
    skipped = [r["skipped"] for r in story if r["kind"] == "train"]
    assert skipped[:6] == [1.0] * 6 and skipped[-1] == 0.0
    one, other = (jax.device_get(Program.restore(workdir)[1]) for workdir in (whole, cut))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.abs(one.ema["embedding"] - one.params["embedding"]).max() > 0

    # The dtype is a runtime choice: its scale is left behind with it, and begins anew.
    half = Program.restore(whole)[0]
    model = dataclasses.replace(half.experiment.model, dtype="float32")
    single = dataclasses.replace(half, experiment=dataclasses.replace(half.experiment, model=model))
    plain = single.read(Checkpointer(whole / "checkpoints", keep=1), 20)
    assert plain.loss_scale is None
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain.params), one.params)
    again = Checkpointer(tmp_path / "single", keep=1)
    again.save(20, plain.replace(guard=None))  # as older versions saved it
    again.wait()
    read = half.read(again, 20)
    assert read.loss_scale.scale == 2.0**24 != one.loss_scale.scale and read.guard.in_row == 0
