"""The loop: what it writes, when it saves, and that stopping it changes nothing."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from bucket import ALL, NOTHING

from llm_jax import hardware, storage
from llm_jax.errors import Stopped, UserError
from llm_jax.report import html
from llm_jax.training import experiment, loop, metrics, step_log
from llm_jax.training.checkpoint import MANIFEST
from llm_jax.training.program import Program
from llm_jax.training.samples import SampleFile
from llm_jax.training.signals import Stop

pytestmark = pytest.mark.slow

TEXT = "To be, or not to be, that is the question.\n" * 60
SMALL = {
    "steps": 40,
    "global_batch_size": 16,
    "steps_per_dispatch": 5,
    "data.validation": "position",
    "data.sequence_length": 32,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "schedule.warmup_steps": 2,
    "evaluation.every": 10,
    "samples.prompt": "To ",
    "samples.tokens": 4,
}
MASKED = {"objective.name": "mlm", "model.causal": False, "samples.prompt": "T<mask>"}
POLICIES = {
    "samples.every": 15,
    "checkpoint.every": 20,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 1,
    "checkpoint.keep_every": 15,
    "model.dropout": 0.1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains in a directory of this name, or in a bucket; gives its path. stop_after: dispatches."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text(TEXT)

    def run(name, stop=None, **changes):
        own = {"data.text": str(root / "text.txt")} | SMALL | changes
        config = experiment.override(experiment.default_config(), own)
        place = storage.path(name) if "://" in name else root / name
        loop.run(experiment.resolve(config), place, say=lambda _: None, stop=stop)
        return place

    return run


class After(Stop):
    """Asked for before the first dispatch and after each; requests the end after so many."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches + 1

    @property
    def reason(self):
        self._left -= 1
        return "the test" if self._left <= 0 else ""


def story(path):
    return metrics.without_time(metrics.read(path / "metrics"))


def saved(path):
    return {int(file.parent.name) for file in (path / "checkpoints").glob(f"*/{MANIFEST}")}


@pytest.fixture(scope="module")
def whole(trained):
    return trained("whole", **POLICIES)


@pytest.fixture(scope="module")
def otherwise(trained):
    """The same run with other runtime fields: saved by time, traced, no samples before the end."""
    changes = {
        "samples.every": 0,
        "checkpoint.every": 0,
        "checkpoint.every_minutes": 1e-9,
        "checkpoint.keep": 99,
        "checkpoint.keep_best": 0,
        "checkpoint.keep_every": 0,
        "logging.profile": "10:15",
    }
    return trained("otherwise", **POLICIES | changes)


def test_stopped_and_resumed(trained, whole):
    """Four attempts, with dropout, samples and policies: the same to the last byte."""
    for dispatches, step in ((1, 5), (2, 15), (3, 30)):
        with pytest.raises(Stopped, match=f"at step {step} of 40"):
            trained("cut", After(dispatches), **POLICIES)
        assert max(saved(whole.parent / "cut")) == step
    cut = trained("cut", After(2), **POLICIES)  # at the last step there is nothing left to stop
    assert story(cut) == story(whole) and len(story(whole)) == 40 + 4
    assert (cut / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    assert saved(cut) == saved(whole)


def test_a_dispatch_begins_where_a_run_goes_on(trained, whole):
    """With more steps a dispatch than before: not where none begins, and else with the same batches."""
    with pytest.raises(Stopped, match="at step 15 of 40"):
        trained("longer", After(3), **POLICIES)
    half = {"steps_per_dispatch": 10, "samples.every": 0, "checkpoint.keep_every": 0}
    with pytest.raises(UserError, match=r"is of step 15, where no dispatch of .*=10 begins; set it to 5"):
        trained("longer", **POLICIES | half)
    left = whole.parent / "longer"
    assert max(saved(left)) == max(r["step"] for r in story(left)) == 15
    with pytest.raises(Stopped, match="at step 20 of 40"):
        trained("longer", After(1), **POLICIES)
    longer = trained("longer", **POLICIES | half)
    losses = [[r["loss"] for r in story(run) if r["kind"] == "train"] for run in (longer, whole)]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_in_a_bucket(trained, whole, bucket):
    """Two attempts where no listing shows anything: the same story as on a disk."""
    bucket.shown = NOTHING
    place, changes = "gs://bucket/runs/a", POLICIES | {"logging.profile": "10:15"}
    with pytest.raises(Stopped, match="at step 25 of 40"):
        trained(place, After(5), **changes)
    run = trained(place, **changes)
    assert story(run) == story(whole)
    assert (run / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    assert html.write(place) == run / "report.html" and "Curves" in (run / "report.html").read_text()
    assert any(name.startswith("bucket/runs/a/profile/plugins/") for name in bucket.stored)
    bucket.shown = ALL
    assert saved(run) == saved(whole)
    with pytest.raises(UserError, match="holds another experiment"):
        trained(place, **changes | {"optimizer.learning_rate": 1.0})


def test_what_is_kept(whole):
    """The newest, the multiples of 15, and the best of the evaluations at 10, 20, 30, 40."""
    losses = {r["step"]: r["loss"] for r in story(whole) if r["kind"] == "evaluation"}
    assert set(losses) == {10, 20, 30, 40}
    assert saved(whole) == {15, 30, 40, min(losses, key=losses.get)}
    content = json.loads(json.loads((whole / "checkpoints" / "00000030" / MANIFEST).read_text())["content"])
    assert content["loss"] == losses[30] and content["about"]["vocab_size"] > 0


def test_the_best_evaluation_is_saved_at_once(trained, monkeypatch):
    """Validation is best at 20, where no other cadence saves; stopped at 30, the next start knows it."""
    losses = {10: 2.0, 20: 1.0, 30: 3.0, 40: 1.5}

    def judged(self, params):
        step = next(unseen)
        return {"validation": {"loss": losses[step], "accuracy": 0.0}}

    monkeypatch.setattr(Program, "evaluate_all", judged)
    changes = {"checkpoint.keep": 1, "checkpoint.keep_best": 1}
    unseen = iter([10, 20, 30])
    with pytest.raises(Stopped, match="at step 30"):
        trained("best", After(6), **changes)
    unseen = iter([40])
    assert saved(trained("best", **changes)) == {20, 40}


def test_samples_checkpoints_and_traces_disturb_nothing(whole, otherwise):
    assert list(SampleFile(whole / "samples.txt").read()) == [15, 30, 40]
    assert list(SampleFile(otherwise / "samples.txt").read()) == [40]
    assert saved(otherwise) == set(range(5, 45, 5))
    assert len(list((otherwise / "profile").rglob("*.xplane.pb"))) == 1
    assert story(otherwise) == story(whole)


def test_times_and_memory(whole):
    train = [r for r in metrics.read(whole / "metrics") if r["kind"] == "train"]
    times = {r["step"]: r["time"] for r in train if "time" in r}
    assert list(times) == list(range(5, 45, 5))  # once a dispatch
    for step, time in times.items():
        assert 0.0 <= time["data_wait"] < 60.0 and time["process_bytes_peak"] > 1e8
        # Not timed: the first dispatch, which compiled, and those after an evaluation or samples.
        assert ("seconds" in time) == (step in (10, 30, 40))
    assert times[10]["tokens_per_second"] == pytest.approx(5 * 16 * 32 / times[10]["seconds"])


def test_norms_by_layer_are_in_the_story(whole):
    for record in metrics.evaluations(story(whole)):
        step = next(r for r in story(whole) if r["kind"] == "train" and r["step"] == record["step"])
        for name in ("param_norm", "grad_norm"):
            norms = record[f"{name}s"]
            assert {"embedding", "blocks/0", "blocks/1"} <= set(norms)
            assert np.sqrt(sum(x**2 for x in norms.values())) == pytest.approx(step[name], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logging.profile": "10"}, "write START:STOP"),
        ({"logging.profile": "20:10"}, "write START:STOP"),
        ({"logging.profile": "11:15"}, "logging.profile"),
        ({"samples.every": 7}, "samples.every=7 is not a multiple of steps_per_dispatch=5"),
        ({"checkpoint.keep_every": 7}, "checkpoint.keep_every=7 is not a multiple"),
        ({"checkpoint.keep_best": -1}, "keep_best must be at least 0"),
        ({"samples.count": -1}, "samples.count must be at least 0"),
        ({"samples.temperature": -1.0}, "samples.temperature must be at least 0"),
        ({"samples.tokens": -1}, "samples.tokens must be at least 0"),
        ({"samples.prompt": "To <mask>"}, "is a decoder and only writes on"),
        ({"objective.name": "mlm", "model.causal": False}, "samples.prompt has no blank"),
        ({"evaluation.batches": -1}, "evaluation.batches must be at least 0"),
        ({"model.dropout": 1.0}, "model.dropout must be at least 0 and less than 1"),
        ({"model.stochastic_depth": 2.0}, "model.stochastic_depth must be"),
        ({"model.mlp_dim": -8}, "model.mlp_dim must be at least 0"),
        ({"model.window": ()}, "one or more sizes"),
        ({"model.window": (-1,)}, "one or more sizes"),
        ({"model.positions": "sinusoidal", "model.model_dim": 15, "model.num_heads": 1}, "must be even"),
        ({"optimizer.learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"optimizer.beta1": 1.5}, "beta1 must be at least 0 and less than 1"),
        ({"objective.label_smoothing": -3.0}, "label_smoothing must be"),
        (MASKED | {"objective.mask_share": 0.9, "objective.random_share": 0.9}, "1.8 together, more than 1"),
        ({"init_skip": "embedding"}, "say how to begin from config.init_from"),
        ({"init_vocabulary": "middle"}, "say how to begin"),
    ],
)
def test_bad_values(trained, changes, message):
    with pytest.raises(UserError, match=message):
        trained("bad", **changes)


def test_the_config_says_what_was_asked_for(whole):
    config = json.loads((whole / "config.json").read_text())["config"]
    assert config["checkpoint"]["keep_best"] == 1 and config["samples"]["every"] == 15
    resolved = dataclasses.asdict(experiment.resolve(config))
    assert resolved["logging"] == {"tensorboard": False, "wandb_project": "", "profile": ""}


def test_power_by_the_driver_s_counter(trained, monkeypatch):
    """A GPU that takes 400 watts, by a counter for its driver's, and a clock that moves when it is read."""
    now = [0.0]

    def monotonic():
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(step_log, "time", SimpleNamespace(monotonic=monotonic, time=step_log.time.time))
    monkeypatch.setattr(hardware, "lookup", lambda kind: hardware.Chip(1e12, 1e9, 1e9))
    monkeypatch.setattr(hardware, "gpu_joules", lambda: 400 * now[0])
    steps = [record for record in metrics.read(trained("power") / "metrics") if record["kind"] == "train"]
    watts = [record["time"]["watts"] for record in steps if "seconds" in record.get("time", {})]
    assert watts == pytest.approx([400] * len(watts)) and watts
