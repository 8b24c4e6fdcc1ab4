"""Bad steps of real runs: what is kept of them, and what a replay finds."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import injection
import jax
import numpy as np
import pytest

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.objectives.clm import CLM
from llm_jax.training import bad_steps, experiment, findings, insides, loop, metrics, replay, step
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.insides import Insides
from llm_jax.training.program import Program
from llm_jax.training.rundir import RunDirectory

SCRIPT = Path(__file__).parents[2] / "scripts" / "replay.py"
ROWS = 8
SMALL = {
    "steps": 12,
    "global_batch_size": ROWS,
    "accumulation": 2,
    "steps_per_dispatch": 4,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.context": 2,  # tokens are counted in their own order
    "data.validation": "position",
    "data.sequence_length": 16,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "objective.z_loss": 0.01,  # what is added to the loss is not the loss of a row
    "objective.label_smoothing": 0.1,
    "schedule.warmup_steps": 2,
    "evaluation.batches": 1,
    "samples.tokens": 1,
    "checkpoint.every": 4,
    "checkpoint.keep": 1,
    "guard.sigma": 20.0,
    "guard.window": 3,
}
BAD_DATA, SPIKE = 7, 10  # steps, counted from 1
BAD_ROW, BAD_TOKEN = (BAD_DATA - 1) * ROWS + 5, 7


def poisoned(to_batch):
    """A token of one row weighs infinitely much: its loss is not finite."""

    def wrapped(self, rows, draws, seed, vocabulary):
        batch = to_batch(self, rows, draws, seed, vocabulary)
        token = np.arange(batch.weights.shape[1]) == BAD_TOKEN
        return batch.replace(weights=np.where((draws == BAD_ROW)[:, None] & token, np.inf, batch.weights))

    return wrapped


def train(root, name, **changes):
    (root / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    own = {"data.text": str(root / "text.txt")} | SMALL | changes
    config = experiment.override(experiment.default_config(), own)
    loop.run(experiment.resolve(config), root / name, say=lambda _: None)
    return root / name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a poisoned row at step 7 and a gradient that is too large at step 10. Both stay as they are
    for the replays."""
    with pytest.MonkeyPatch.context() as patch:
        fault = injection.Fault(SPIKE - 1, "spike", "leaf", number=5)
        patch.setattr(injection, "SIGMAS", 100.0)
        patch.setattr(step, "make_gradients", injection.faulty(step.make_gradients, [fault]))
        patch.setattr(CLM, "to_batch", poisoned(CLM.to_batch))
        yield train(tmp_path_factory.mktemp("runs"), "bad")


@pytest.mark.slow
def test_what_is_kept(run):
    """Both steps are in the story and in bad_steps/, with the checkpoints before them, which the run itself
    has dropped."""
    story = [r for r in metrics.read(run / "metrics") if r["kind"] == "train"]
    assert {r["step"] for r in story if r["skipped"]} == {BAD_DATA, SPIKE}
    assert {r["step"] for r in story if r["bad_in_row"] == 1} == {BAD_DATA, SPIKE}
    directory = RunDirectory(run).bad_steps
    assert bad_steps.steps(directory) == [BAD_DATA, SPIKE]
    data, spike = (bad_steps.BadStep.read(directory, s) for s in (BAD_DATA, SPIKE))
    assert (data.begin, spike.begin) == (4, 8)
    assert data.reason == "the loss is not finite (nan)" and np.isnan(data.grad_norms["blocks/0"])
    assert spike.limit < spike.grad_norm == story[SPIKE - 1]["grad_norm"]
    assert Checkpointer(run / "checkpoints", keep=1).steps() == [12]
    program = Program.restore(run)[0]
    for bad in (data, spike):
        kept = Checkpointer(directory / f"{bad.step:08d}", keep=1)
        assert kept.steps() == [bad.begin]
        assert program.read(kept, bad.begin).step == bad.begin  # every byte is checked


@pytest.mark.slow
def test_a_bad_row_is_found(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replay.py", f"--workdir={run}", f"--step={BAD_DATA}", "--json"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["where"] == insides.LOSS and "forward" in found["verdict"]
    assert found["begin"] == 4 and found["recorded"][0] == found["loss"] == "nan" and found["same"]
    assert found["bad_rows"] == {
        "embedding": 0,
        "blocks/0": 0,
        "blocks/1": 0,
        "final_norm": 0,
        insides.LOSS: 1,
    }
    row = found["rows"][0]
    assert (row["draw"], row["token"]) == (BAD_ROW, BAD_TOKEN) and len(row["text"]) == 16
    assert sorted(row["draw"] for row in found["rows"]) == list(range(6 * ROWS, 7 * ROWS))


@pytest.mark.slow
def test_a_spike_is_found_with_its_bits(run):
    """In the middle of a dispatch: the step before it is made by a dispatch that is cut short."""
    said = []
    found = replay.replay(run, None, said.append)
    directory = RunDirectory(run).bad_steps
    bad = bad_steps.BadStep.read(directory, SPIKE)
    leaf = injection.leaf_names(Program.restore(run)[1].params)[5]
    assert leaf.startswith("blocks/") and found.where.startswith("blocks/") and "spike" in found.verdict
    assert (found.loss, found.grad_norm) == (bad.loss, bad.grad_norm) and found.same
    assert found.limit == pytest.approx(bad.limit, rel=1e-6)
    record = next(r for r in metrics.read(run / "metrics") if r["kind"] == "train" and r["step"] == SPIKE)
    mean = found.insides.losses_bl.sum() / record["target_tokens"]  # with the run's own dropout
    assert mean == pytest.approx(found.loss, rel=1e-5)
    for place, norm in bad.grad_norms.items():
        assert found.insides.grad_norms[place] == pytest.approx(norm, rel=1e-4)
    assert said == ["replaying steps 9 to 10"]
    page = findings.table(found)
    assert "the same bits" in page and f"rows {9 * ROWS} to {10 * ROWS - 1}" in page


@pytest.mark.slow
def test_an_absurd_learning_rate_is_found(tmp_path):
    """Step 1 makes the parameters huge: every later one is bad, the third ends the run, nothing is saved."""
    changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 1e25, "optimizer.clip_norm": 0.0}
    with pytest.raises(UserError, match=r"3 bad steps in a row up to step 4 .* the first, 2: .*--step=2"):
        train(tmp_path, "absurd", **changes, **{"guard.patience": 3})
    run = tmp_path / "absurd"
    assert Checkpointer(run / "checkpoints", keep=1).steps() == []
    assert [r["step"] for r in metrics.read(run / "metrics")][-1] == 4
    found = replay.replay(run, None, lambda _: None)
    assert found.step == 2 and found.begin == 0 and found.same
    assert found.where == "blocks/1" and found.verdict.startswith("backward: blocks/1, going back")
    with pytest.raises(UserError, match="steps 1 to 12"):
        replay.replay(run, 13, print)


@pytest.mark.slow
def test_the_first_layer_that_overflows_is_found(run):
    """A number of the second block's MLP is as large as float32 has them."""
    program, state = Program.restore(run)
    block = state.params["blocks"]["mlp"]["out"]
    with jax.set_mesh(program.layout.mesh):
        index = np.arange(2)[:, None, None]
        block = jax.jit(lambda x: jax.numpy.where(index == 1, 3e38, x))(block)
    blocks = state.params["blocks"] | {"mlp": state.params["blocks"]["mlp"] | {"out": block}}
    inside = insides.look(
        program, state.replace(params=state.params | {"blocks": blocks}), replay.batch_of(program, 12)
    )
    where, verdict = findings.judge(inside, np.nan, np.nan, np.inf, {}, True)
    assert where == "blocks/1" and verdict.startswith("forward: blocks/1 is the first") and not inside.params
    bad = jax.jit(lambda x: jax.numpy.where(index == 1, np.nan, x))(block)
    assert insides.named(insides.not_finite({"blocks": {"mlp": {"out": bad}}})) == {"blocks/1": ["mlp/out"]}


# ---- the verdict ------------------------------------------------------------------------------

FINE = Insides(
    places=["embedding", "blocks/0", "blocks/1", "final_norm", insides.LOSS],
    largest={"embedding": 1.0},
    finite_nbl=np.ones((5, 2, 3), bool),
    losses_bl=np.ones((2, 3)),
    params={},
    gradients={},
    grad_norms={"blocks/0": 1.0, "blocks/1": 2.0, "embedding": 3.0, "final_norm": 1.0, "head": 1.0},
)
NAMES = ["embedding", "final_norm", "blocks/0", "blocks/1", "head"]


@pytest.mark.parametrize(
    ("gradients", "where"),
    [
        (NAMES, "head"),
        (NAMES[:4], "final_norm"),
        (["embedding", "blocks/0", "blocks/1"], "blocks/1"),
        (["embedding", "blocks/0"], "blocks/0"),
        (["embedding"], "embedding"),
    ],
)
def test_backward_goes_back(gradients, where):
    inside = dataclasses.replace(FINE, gradients={name: ["w"] for name in gradients})
    assert findings.judge(inside, 1.0, np.nan, np.inf, {}, True)[0] == where


def test_other_verdicts():
    usual = {"blocks/0": 1.0, "blocks/1": 1.0, "embedding": 2.9}
    assert findings.judge(FINE, 1.0, 4.0, 3.0, usual, True)[0] == "blocks/1"  # it has grown most
    assert findings.judge(FINE, 1.0, 4.0, 3.0, {}, True)[0] == "embedding"
    assert "overflow" in findings.judge(FINE, 1.0, np.inf, np.inf, usual, True)[1]
    assert findings.judge(FINE, 1.0, 4.0, 5.0, usual, True) == ("", findings.FINITE)
    assert "nothing is wrong" in findings.judge(FINE, 1.0, 4.0, 5.0, usual, False)[1]
    tampered = dataclasses.replace(FINE, params={"blocks/1": ["mlp/in"]})
    assert "parameters" in findings.judge(tampered, 1.0, 1.0, np.inf, usual, True)[1]


# ---- what is kept -----------------------------------------------------------------------------


class Saved:
    """A checkpointer with these steps."""

    def __init__(self, run, *steps):
        for saved in steps:
            path = run.checkpoints / f"{saved:08d}" / "state"
            path.mkdir(parents=True)
            (path / "array").write_text(str(saved))
        self._steps = list(steps)

    def wait(self):
        pass

    def steps(self):
        return self._steps


def values(in_row, loss=np.nan):
    return {"bad_in_row": in_row, "loss": loss, "grad_norm": np.nan}


def test_checkpoints_of_bad_steps_are_linked_and_only_two_stay(tmp_path):
    run = RunDirectory(tmp_path)
    seen, squares = bad_steps.BadSteps(run, Saved(run, 10, 20, 30), patience=2), {"head": np.float32(4.0)}
    assert "--step=5 " in seen.see(5, values(1), squares)
    assert seen.see(6, values(0), squares) is None
    for s in (11, 21, 31):
        seen.see(s, values(1), squares)
    assert bad_steps.steps(run.bad_steps) == [5, 11, 21, 31]
    kept = {path.relative_to(run.bad_steps).as_posix() for path in run.bad_steps.glob("*/*")}
    assert kept == {"00000021/00000020", "00000031/00000030"}
    copy, original = run.bad_steps / "00000021/00000020", run.checkpoints / "00000020"
    assert (copy / "state/array").samefile(original / "state/array")
    assert bad_steps.BadStep.read(run.bad_steps, 31).grad_norms == {"head": 2.0}


def test_checkpoints_of_bad_steps_in_a_bucket(bucket):
    """Copied inside it, once and again after a copy that was cut."""
    run = RunDirectory(storage.path("gs://bucket/run"))
    checkpoint, kept = run.checkpoints / "00000010", run.bad_steps / "00000011"
    for name in ("state/array", "manifest.json"):
        storage.write_text(checkpoint / name, name)
    bucket.put("bucket/run/bad_steps/00000011/00000010/state/array", b"half")
    for puts in (5, 5):
        bad_steps.keep_checkpoint(checkpoint, kept)
        assert len(bucket.puts) == puts
    for name in ("state/array", "manifest.json"):
        assert (kept / "00000010" / name).read_text() == name
    step = bad_steps.BadStep(11, "bad", 1.0, 2.0, 3.0, 10, {"head": 2.0})
    step.write(run.bad_steps)
    assert bad_steps.BadStep.read(run.bad_steps, 11) == step and bad_steps.steps(run.bad_steps) == [11]


def test_a_streak_that_began_before_a_restart_is_told_whole(tmp_path):
    run = RunDirectory(tmp_path)
    bad_steps.BadSteps(run, Saved(run), patience=9).see(5, values(1), {})
    again = bad_steps.BadSteps(run, Saved(run), patience=3)
    assert again.see(6, values(2), {}) is None
    with pytest.raises(
        UserError, match=r"3 bad steps in a row up to step 7 .* the first, 5: the loss is not"
    ):
        again.see(7, values(3), {})


def test_a_damaged_note_is_named(tmp_path):
    (tmp_path / "00000005.json").write_text('{"step": 5}')
    with pytest.raises(UserError, match=r"00000005.json is corrupt"):
        bad_steps.BadStep.read(tmp_path, 5)
