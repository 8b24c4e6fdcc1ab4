"""Beginning from another run: what is taken, what is refused, and what a larger vocabulary begins as."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from llm_jax.errors import Stopped, UserError
from llm_jax.training import experiment, loop, metrics, warm_start
from llm_jax.training.checkpoint import Source
from llm_jax.training.program import Program
from llm_jax.training.rules import parameter_name
from llm_jax.training.signals import Stop

pytestmark = pytest.mark.slow

OLD = "To be, or not to be, that is the question.\n" * 40
NEW = OLD + "XYZ & 0123456789\n" * 40
SMALL = {
    "steps": 10,
    "global_batch_size": 16,
    "steps_per_dispatch": 5,
    "data.validation": "position",
    "data.sequence_length": 32,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "schedule.warmup_steps": 2,
    "evaluation.every": 5,
    "samples.prompt": "To ",
    "samples.tokens": 4,
}


class AtOnce(Stop):
    """Asked for before the first dispatch and after it, which is when it stops."""

    asked = False

    @property
    def reason(self):
        asked, self.asked = self.asked, True
        return "the test" if asked else ""


class Runs:
    def __init__(self, root):
        self.root = root
        for name, text in (("old", OLD), ("new", NEW)):
            (root / f"{name}.txt").write_text(text)

    def config(self, text="old", **changes):
        own = {"data.text": str(self.root / f"{text}.txt")} | SMALL | changes
        return experiment.resolve(experiment.override(experiment.default_config(), own))

    def train(self, name, text="old", **changes):
        """To the end of the next dispatch, which is saved; gives the run directory."""
        with contextlib.suppress(Stopped):
            loop.run(self.config(text, **changes), self.root / name, say=lambda _: None, stop=AtOnce())
        return self.root / name

    def program(self, text="old", **changes):
        config = self.config(text, init_from=str(self.root / "first"), **changes)
        return Program.prepare(config, self.root / f"{text}_data", say=lambda _: None)

    def warm(self, text="old", **changes):
        """The program and {name: array} of what it would begin with."""
        program, said = self.program(text, **changes), []
        params = warm_start.params_from(program, Source.find(self.root / "first"), said.append)
        return program, flat(params), "; ".join(said)


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {parameter_name(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.train("first", seed=3)
    return runs


@pytest.fixture(scope="module")
def old(runs):
    return flat(Program.restore(runs.root / "first")[1].params)


@pytest.mark.parametrize("mesh", [{}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}])
def test_parameters_alone_on_any_mesh(runs, old, mesh):
    program, params, said = runs.warm(**mesh)
    for name, value in old.items():
        np.testing.assert_array_equal(params[name], value)
    assert f"parameters: {len(old)} from" in said and ", 0 fresh" in said and "tokenizer" not in said
    warm = warm_start.params_from(program, Source.find(runs.root / "first"), lambda _: None)
    state, fresh = program.begin(warm), program.init()
    assert state.step == 0
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(fresh.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, fresh.params)
    assert all(jax.tree.leaves(same))


def test_a_run_says_what_it_began_from(runs, old):
    source = Source.find(runs.root / "first")
    run = runs.train("second", init_from=str(source.path))  # a checkpoint directory serves as well
    content = json.loads((run / "config.json").read_text())
    assert content["init"] == source.hash
    plain = json.loads((runs.train("plain") / "config.json").read_text())
    assert "init" not in plain and plain["fingerprint"] != content["fingerprint"]
    losses = {name: first_loss(runs.root / name) for name in ("first", "second", "plain")}
    assert losses["second"] < losses["plain"] - 0.1, losses


def first_loss(path):
    return next(r["loss"] for r in metrics.read(path / "metrics") if r["kind"] == "train")


def test_a_run_that_goes_on_does_not_look_at_it(runs):
    shutil.copytree(runs.root / "first", runs.root / "moved")
    init = {"init_from": str(runs.root / "moved")}
    begun = json.loads((runs.train("goes_on", **init) / "config.json").read_text())
    shutil.rmtree(runs.root / "moved")
    run = runs.train("goes_on", **init)
    assert [r["step"] for r in metrics.read(run / "metrics") if r["kind"] == "train"] == list(range(1, 11))
    assert json.loads((run / "config.json").read_text()) == begun


def test_stopped_before_the_first_checkpoint(runs):
    """Another source, or none, would make another run of it: refused. The same is fine."""
    shutil.copytree(runs.root / "first", runs.root / "again")
    init = {"init_from": str(runs.root / "again")}
    run = runs.train("early", **init)
    shutil.rmtree(run / "checkpoints")
    first = json.loads((run / "config.json").read_text())
    runs.train("other", seed=4)
    with pytest.raises(UserError, match="began from another checkpoint"):
        runs.train("early", init_from=str(runs.root / "other"))
    assert json.loads((run / "config.json").read_text()) == first
    runs.train("early")  # the path is remembered
    assert json.loads((run / "config.json").read_text()) == first
    with pytest.raises(UserError, match="began from fresh parameters"):
        runs.train("other", seed=4, **init)


def test_all_that_does_not_fit_is_in_one_message(runs):
    changes = {"model.num_layers": 3, "model.norm": "layernorm", "model.positions": "learnt"}
    with pytest.raises(UserError) as caught:
        runs.warm(**changes)
    message = str(caught.value)
    assert "missing there: " in message and "position_embedding" in message
    assert (
        "blocks/attention/query is [[2, 16, 2, 8], 'float32'] there, [[3, 16, 2, 8], 'float32'] here"
        in message
    )
    assert "blocks/mlp/in" in message and "\n" not in message and "init_skip" in message
    assert "embedding is" not in message.replace("position_embedding is", "")
    with pytest.raises(UserError, match=r"not in this model: blocks/mlp/\w+"):
        runs.warm(**{"model.activation": "gelu", "init_skip": ("blocks/mlp/in",)})


def test_what_is_skipped_stays_fresh(runs, old):
    program, params, said = runs.warm(init_skip=("blocks/mlp/.*", "embedding"))
    fresh = flat(program.fresh_params())
    skipped = {name for name in old if name.startswith("blocks/mlp/")} | {"embedding"}
    for name in old:
        np.testing.assert_array_equal(params[name], (fresh if name in skipped else old)[name])
    assert not np.array_equal(fresh["embedding"], old["embedding"])
    assert f"{len(old) - len(skipped)} from" in said and f", {len(skipped)} fresh" in said


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("embed",), "'embed' matches none of "),
        (("embedding", "blocks/attention/q"), "'blocks/attention/q' matches none"),
        (("(",), "is no regular expression"),
    ],
)
def test_a_pattern_must_match(runs, patterns, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        runs.warm(init_skip=patterns)


def test_a_larger_vocabulary_is_an_error_unless_chosen(runs):
    with pytest.raises(UserError, match=r"has \d+ tokens, this model \d+ \(embedding\); config.init_vocab"):
        runs.warm("new")
    *_, said = runs.warm("new", init_skip=("embedding",))  # nothing of the old vocabulary is taken
    assert "tokenizer" not in said


# 300: beyond the padding of the old embedding, 128 rows; the new text alone stays within it.
@pytest.mark.parametrize("vocab_size", [0, 300])
@pytest.mark.parametrize("mesh", [{}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}])
def test_new_rows(runs, old, vocab_size, mesh):
    sizes = {"model.vocab_size": vocab_size}
    program, mean, _ = runs.warm("new", init_vocabulary="mean", **sizes, **mesh)
    _, kept, said = runs.warm("new", init_vocabulary="fresh", **sizes, **mesh)
    assert "the tokenizer is another one" in said
    fresh = flat(program.fresh_params())["embedding"]
    before = Source.find(runs.root / "first").about("vocab_size")
    now = program.experiment.model.vocab_size
    assert before < now and len(fresh) == (384 if vocab_size else 128)
    rows = old["embedding"][:before]
    for params in (mean, kept):
        np.testing.assert_array_equal(params["embedding"][:before], rows)
        np.testing.assert_array_equal(params["blocks/mlp/in"], old["blocks/mlp/in"])
    np.testing.assert_array_equal(kept["embedding"][before:], fresh[before:])
    np.testing.assert_array_equal(mean["embedding"][now:], fresh[now:])
    off = mean["embedding"][before:now] - rows.mean(axis=0)
    assert 0 < np.abs(off).max() < 0.06 * rows.std()
    assert len(np.unique(off[:, 0])) == now - before  # no two new tokens are the same
    if mesh:
        _, alone, _ = runs.warm("new", init_vocabulary="mean", **sizes)
        np.testing.assert_array_equal(alone["embedding"], mean["embedding"])


def test_old_tokens_keep_their_probabilities(runs):
    """With the mean, a new token is about as likely as the average old one, so the loss hardly moves."""
    old = metrics.evaluations(metrics.read(runs.root / "first" / "metrics"))[-1]
    source = Source.find(runs.root / "first")
    program = runs.program(init_vocabulary="mean", **{"model.vocab_size": 64})
    loss = program.evaluate(warm_start.params_from(program, source, lambda _: None))["loss"]
    assert old["loss"] < loss < old["loss"] + np.log(64 / source.about("vocab_size")) + 0.1


def test_a_vocabulary_cannot_shrink(runs):
    source = Source.find(runs.root / "first")
    larger = dataclasses.replace(source, manifest=source.manifest | {"about": {"vocab_size": 300}})
    for choice in ("error", "mean", "fresh"):
        with pytest.raises(UserError, match="a vocabulary cannot shrink"):
            warm_start.params_from(runs.program(init_vocabulary=choice), larger, lambda _: None)


def test_a_changed_byte_is_named(runs):
    shutil.copytree(runs.root / "first", runs.root / "damaged")
    source = Source.find(runs.root / "damaged")
    path = max((source.path / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} is corrupt"):
        runs.train("from_damaged", init_from=str(runs.root / "damaged"))
    with pytest.raises(UserError, match="neither a checkpoint nor a run directory"):
        runs.train("from_nowhere", init_from=str(runs.root / "nowhere"))
    runs.train("from_nowhere", init_from=str(runs.root / "first"))  # the failed start left no run behind
