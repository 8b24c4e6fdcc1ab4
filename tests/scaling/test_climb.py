"""A whole ladder, from plan to score. A short script that knows the truth stands for scripts/train.py."""

import json
from functools import partial

import pytest

from llm_jax import storage
from llm_jax.errors import Stopped, UserError
from llm_jax.scaling import forecast, study
from llm_jax.scaling.climb import Climb
from llm_jax.scaling.ladder import Ladder, Shape
from llm_jax.scaling.recipes import Recipe
from llm_jax.training.experiment import default_config
from llm_jax.training.signals import Stop

PROGRAM = """
import hashlib, json, sys
from pathlib import Path

flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
config = json.loads(Path(flags["--config"]).read_text())["config"]
run = Path(flags["--workdir"])
if config["model"]["model_dim"] == int(Path(sys.argv[0]).with_name("bad").read_text() or 0):
    sys.exit("error: no space left")
(run / "metrics").mkdir(parents=True, exist_ok=True)
sealed = hashlib.sha256(json.dumps({"config": config}, sort_keys=True).encode()).hexdigest()
(run / "config.json").write_text(json.dumps({"config": config, "sha256": sealed}))
(run / "environment.json").write_text(json.dumps({"devices": {"kind": "cpu", "count": 1}}))
tokens = config["steps"] * config["global_batch_size"] * config["data"]["sequence_length"]
width = config["model"]["model_dim"]
params = 12 * width**2 * config["model"]["num_layers"]
loss = 1.0 + 30 / params**0.3 + 60 / tokens**0.3
lines = [{"kind": "start", "step": 0}]
lines += [{"kind": "train", "step": s + 1, "loss": loss, "skipped": 0.0} for s in range(config["steps"])]
lines += [{"kind": "evaluation", "set": "validation", "step": config["steps"], "loss": loss}]
name = run / "metrics" / "0001.jsonl"
name.write_text("".join(json.dumps({"attempt": 1, **line}) + "\\n" for line in lines))
"""

LADDER = Ladder(
    shapes=tuple(Shape(width, 2) for width in (16, 24, 32, 48, 64, 96)),
    head_dim=8,
    budgets=(2e9, 6e9, 2e10),
    held_out=6e10,
    first_params=1e4,
    recipe=Recipe(),
    machine="cpu",
    speed=1e10,
    overhead=1.0,
    workers=2,
    sizes=4,
    fewest_steps=5,
)


@pytest.fixture
def climb(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "study", partial(study.study, names=("tied", "frontier"), repeats=100))
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 40)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "bad").write_text("")
    config = default_config(tokenizer="byte")
    config.steps, config.global_batch_size, config.data.sequence_length = 1000, 4, 16
    config.data.text, config.data.validation = (str(tmp_path / "text.txt"),), "position"
    config.model.vocab_size, config.schedule.warmup_steps = 261, 1
    said = []
    made = Climb(LADDER, config, tmp_path / "ladder", tmp_path / "program.py", Stop(), said.append)
    return made, said


@pytest.mark.slow
def test_from_the_first_run_to_the_score(climb):
    climb, said = climb
    scored = climb.run()
    made = forecast.read(climb.directory / "forecast.json")
    assert scored["predicted"] == made.loss and abs(scored["error"]) < 0.02 and scored["inside"]
    table = [json.loads(line) for line in (climb.directory / "runs" / "table.jsonl").read_text().splitlines()]
    assert len(table) == 12 and max(row["training_flops"] for row in table) < 2.1e10  # the held-out is none
    law = json.loads((climb.directory / "law.json").read_text())
    assert made.law == storage.content_hash(climb.directory / "law.json") and law["table"]["runs"] == 12
    centres = [line for line in said if line.startswith("budget")]
    assert len(centres) == 3
    # the same command again trains, fits and foretells nothing anew
    before = {p: p.read_bytes() for p in climb.directory.rglob("*.json*") if "table" not in p.name}
    assert climb.run() == scored
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_that_fails_is_named_and_the_same_command_goes_on(climb, tmp_path):
    climb, _ = climb
    (tmp_path / "bad").write_text("32")
    with pytest.raises(UserError, match=r"point 2 .*model_dim=32.* failed; the same command tries again"):
        climb.train()
    (tmp_path / "bad").write_text("")
    assert len(climb.train()) == 12


def test_it_stops_when_it_is_told(climb):
    climb, _ = climb
    climb.stop.notice = "SIGTERM"
    with pytest.raises(Stopped, match=r"SIGTERM; 0 of 4 runs are done"):
        climb.run()
    assert not (climb.directory / "forecast.json").exists()
