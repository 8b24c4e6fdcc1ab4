"""Several runs as one program: each is what it would be alone, whatever stops them, whoever diverges."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.errors import Stopped, UserError
from llm_jax.mesh import MeshConfig, make_layout
from llm_jax.training import experiment, loop, metrics, together, together_loop
from llm_jax.training.program import Program
from llm_jax.training.signals import Stop
from llm_jax.training.together import Together

pytestmark = pytest.mark.slow

TEXT = "To be, or not to be, that is the question.\n" * 60
SMALL = {
    "steps": 20,
    "global_batch_size": 8,
    "steps_per_dispatch": 5,
    "data.validation": "position",
    "data.sequence_length": 16,
    "model.num_layers": 1,
    "model.model_dim": 8,
    "model.num_heads": 1,
    "model.scan_layers": False,
    "model.dtype": "float32",
    "schedule.warmup_steps": 2,
    "evaluation.every": 10,
    "evaluation.batches": 2,
    "checkpoint.every": 5,
    "checkpoint.keep": 1,
    "guard.patience": 3,
}
FREE = [{"seed": 0, "optimizer.learning_rate": 1e-3}, {"seed": 3, "optimizer.learning_rate": 1e-2}]
WILD = {"seed": 1, "optimizer.learning_rate": 1e30}


class After(Stop):
    """Asked for before the first dispatch and after each; requests the end after so many."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches + 1

    @property
    def reason(self):
        self._left -= 1
        return "the test" if self._left <= 0 else ""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where runs have one device, and sum up their parameters instead of writing samples: compiled sooner."""
    root, build = tmp_path_factory.mktemp("runs"), Program.build
    (root / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "build", lambda e, directory: build(e, directory, jax.devices()[:1]))
        for module in (loop, together_loop):
            patch.setattr(module, "sample_text", lambda program, params: f"{optax.tree.sum(params):.4f}\n")
        yield root


@pytest.fixture(scope="module")
def resolved(root):
    def resolved(changes):
        own = {"data.text": str(root / "text.txt")} | SMALL | changes
        return experiment.resolve(experiment.override(experiment.default_config(optimizer="sgd"), own))

    return resolved


@pytest.fixture(scope="module")
def trained(root, resolved):
    """Trains in one directory a run, NAME/0 and so on; gives their paths."""

    def trained(name, changes, stop=None, say=lambda _: None):
        places = [root / name / str(i) for i in range(len(changes))]
        together_loop.run([resolved(own) for own in changes], places, say, stop)
        return places

    return trained


@pytest.fixture(scope="module")
def group(trained):
    return trained("group", FREE)


def story(path):
    return metrics.without_time(metrics.read(path / "metrics"))


def assert_close(a, b):
    """Two stories, up to last bits."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)


def test_a_member_is_the_run_alone(group, root, resolved):
    loop.run(resolved(FREE[1]), root / "alone", say=lambda _: None)
    assert_close(story(group[1]), story(root / "alone"))
    for name in ("config.json", "samples.txt"):
        assert (group[1] / name).read_bytes() == (root / "alone" / name).read_bytes()
    program, state = Program.restore(group[1])
    assert int(state.step) == 20 and program.experiment.seed == 3
    assert json.loads((group[1] / "environment.json").read_text())["mesh"]["members"] == 2


@pytest.fixture(scope="module")
def mixed(trained):
    """The first one diverges."""
    return trained("mixed", [WILD, FREE[1]])


def test_who_diverges_ends_alone(group, mixed):
    assert story(mixed[1]) == story(group[1])  # to the last bit
    end = story(mixed[0])[-1]
    assert end["step"] == 4 and end["bad_in_row"] == 3  # step 1 is the one that goes wrong


def test_one_that_diverged_stays_so(mixed, trained, root):
    with pytest.raises(Stopped, match="at step 5 of 20, which is saved"):
        trained("cut_mixed", [WILD, FREE[1]], After(1))
    # As if the group had been killed before: it begins anew, but for the one whose story has ended.
    shutil.rmtree(root / "cut_mixed" / "1" / "checkpoints")
    cut = trained("cut_mixed", [WILD, FREE[1]])
    assert [story(one) for one in cut] == [story(one) for one in mixed]
    with pytest.raises(UserError, match="3 bad steps in a row up to step 4"):
        trained("mixed", [WILD])


def test_stopped_and_killed_it_goes_on_exactly(group, trained, root):
    with pytest.raises(Stopped, match="at step 10 of 20, which is saved"):
        trained("cut", FREE, After(2))
    # As if it had been killed when one was saved, and the other not yet.
    shutil.rmtree(root / "cut" / "1" / "checkpoints" / "00000010")
    said = []
    cut = trained("cut", FREE, say=said.append)
    assert any("resuming at step 5" in line for line in said)
    for one, other in zip(cut, group, strict=True):
        assert story(one) == story(other) and len(story(one)) == 20 + 2
        assert (one / "samples.txt").read_bytes() == (other / "samples.txt").read_bytes()


def test_a_group_that_lacks_a_member_says_so(group, trained):
    said = []
    trained("group", FREE[:1], say=said.append)
    assert any("mesh was {'members': 2" in line and "no longer the same bits" in line for line in said)


@pytest.fixture(scope="module")
def programs(group):
    """On so many devices."""
    restored = [Program.restore(place)[0] for place in group]

    def programs(devices):
        layout = make_layout(MeshConfig(data=-1), jax.devices()[:devices])
        return tuple(dataclasses.replace(program, layout=layout) for program in restored)

    return programs


def losses(group, dispatches, poison=0.0):
    """[member][step] of the last dispatch. poison: added to the first one's parameters."""
    states = group.init()
    states[0] = states[0].replace(params=jax.tree.map(lambda x: x + poison, states[0].params))
    states = group.stack(states)
    for dispatch in range(dispatches):
        states, results = group.steps(states, [program.batches[dispatch] for program in group.programs])
    return [jax.device_get(result["loss"]) for result in results]


def test_at_once_is_one_after_another(programs):
    """Which serves any mesh: here of two devices. One member that is NaN leaves the other the same, to the
    last bit."""
    group = Together(programs(1), at_once=True)
    found = losses(group, 4)
    assert not np.allclose(found[0], found[1], rtol=1e-2)  # two runs, not one twice
    np.testing.assert_allclose(losses(Together(programs(2), at_once=False), 4), found, rtol=1e-4)
    poisoned = losses(group, 4, jnp.nan)
    assert np.isnan(poisoned[0]).all()
    np.testing.assert_array_equal(poisoned[1], found[1])


def test_at_once_on_one_accelerator_alone(programs):
    def on(platform, devices):
        whole = programs(devices)
        layout = dataclasses.replace(whole[0].layout, platform=platform)
        return Together.of(dataclasses.replace(program, layout=layout) for program in whole).at_once

    assert on("gpu", 1) and not on("gpu", 2) and not on("cpu", 1)


def test_what_cannot_be_one_program_is_said(resolved):
    first = resolved(FREE[0])
    for changes, message in (
        ({**FREE[1], "optimizer.weight_decay": 0.3}, "config.optimizer.weight_decay differs: .* all but"),
        ({**FREE[1], "evaluation.patience": 1}, "config.evaluation.patience=1: runs .* end together"),
        (
            {**FREE[1], "accumulation": 0, "evaluation.batch_size": 8},
            "config.accumulation=0: .* give a number",
        ),
        (FREE[0], "two of the runs to train together are the same"),
    ):
        with pytest.raises(UserError, match=message):
            together.check([first, resolved(changes)])
    together.check([first, resolved({**FREE[1], "checkpoint.at": (10,)})])
