"""From flags to the text of a job: golden files, misuse, and the entry points."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from launch_jobs import GOLDEN, JOBS, QUOTED, RUN, emitted

from llm_jax.errors import UserError
from llm_jax.planning import launch
from llm_jax.training import experiment, metrics
from llm_jax.training.early_stopping import at_the_end
from llm_jax.training.rundir import RunDirectory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", JOBS)
def test_golden(name):
    assert emitted(name) == (GOLDEN / name).read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"topology": "v5p"}, "give a kind and a shape"),
        ({"topology": "v5p:4x4"}, "v5p:4x4 is not offered"),
        ({"topology": "v5p:3x4x8"}, "rising multiples of 4"),
        ({"topology": "v5e:4x5"}, "there are 1x1, 2x2"),
        ({"topology": "v9:4x4"}, "'v9' is not known"),
        ({"topology": "h100:8x2x2"}, "GPUs a node x nodes"),
        ({"topology": "v5e:2x4", "slices": 2}, "only TPU slices of several hosts"),
        ({"topology": "tpu7x:4x4x4"}, "GKE alone; use --emit=jobset"),
        ({"topology": "h100:8x2"}, "--emit=slurm is for GPUs"),
        ({"emit": "slurm"}, "--emit=slurm is for GPUs, not v5p:4x4x8"),
        ({"emit": "slurm", "topology": "h100:8x2", "slices": 2}, "only TPU slices"),
        ({"emit": "slurm", "topology": "h100:8x2", "spot": True}, "--queue"),
        ({"emit": "jobset"}, "needs --image"),
        ({"emit": "jobset", "image": "i", "workdir": "/mnt/run"}, "lost with its pod"),
        ({"workdir": "runs/x"}, "a path of one machine, and the job has 32"),
        ({"workdir": "/tmp/x"}, "lost with its machine"),
        ({"workdir": "gs://bucket/"}, "a whole bucket"),
        ({"config": "/home/me/c.py"}, "its path in the checkout"),
        ({"zone": ""}, "needs --zone"),
        ({"image": "i"}, "--setup=LINE"),
        ({"queue": "q"}, "leave it out"),
        ({"spot": True, "reservation": "r"}, "exclude one another"),
        ({"name": "Llama_8B"}, "a letter first"),
        ({"max_retries": -1}, "at least 0"),
        ({"points": 6}, "a point of a sweep is one process"),
    ],
)
def test_misuse_is_one_line(changes, message):
    parser = argparse.ArgumentParser()
    launch.add_flags(parser)
    args = parser.parse_args([])
    args.config, args.workdir = "configs/llama_8b.py", "gs://b/llama_8b"
    flags = {"emit": "gcloud", "topology": "v5p:4x4x8", "zone": "z", **changes}
    points = flags.pop("points", 0)
    vars(args).update(flags)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        launch.write(args, "scripts/train.py", {}, points)
    assert "\n" not in str(error.value)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs an entry point in this process; gives its exit code, output and errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


LLAMA = ("--config=configs/llama_8b.py", "--workdir=gs://b/llama_8b")


def test_launch_writes_the_command_it_was_given(script, tmp_path):
    flags = ("--emit=slurm", "--topology=h100:8x2", f"--out={tmp_path}/job.sh", QUOTED)
    assert script("launch.py", *LLAMA, *flags) == (0, "", "")
    text = (tmp_path / "job.sh").read_text()
    (command,) = re.findall(r"^srun --cpu-bind=none (.*) &$", text, re.MULTILINE)
    assert shlex.split(command) == list(RUN["command"])
    assert "JAX_COMPILATION_CACHE_DIR=gs://b/compilation_cache" in text and "job-name=llama-8b" in text


def test_launch_refuses_a_bad_config_before_anything_is_booked(script):
    flags = ("--emit=slurm", "--topology=h100:8x2")
    code, out, err = script("launch.py", *LLAMA, *flags, "--config.model.num_head=3")
    assert (code, out) == (2, "") and "did you mean config.model.num_heads?" in err
    code, out, err = script("launch.py", *LLAMA, "--emit=slurm")
    assert code == 2 and "--topology are required" in err


def test_sweep_writes_an_array_over_its_points(script):
    flags = ("--config=configs/sweep_learning_rate.py", "--workdir=/data/sweep")
    code, out, err = script("sweep.py", *flags, "--emit=slurm", "--topology=gpu:1", "--name=rates")
    assert (code, err) == (0, "") and "#SBATCH --array=0-5\n" in out
    assert script("sweep.py", *flags, "--emit=slurm", "--topology=gpu:1", "--index=1")[0] == 2
    assert "scripts/sweep.py" in out and '--index="$SLURM_ARRAY_TASK_ID" &' in out


def test_finished_is_asked_of_the_run(script, tmp_path):
    finished = lambda: script("launch.py", f"--finished={tmp_path}") == (0, "", "")  # noqa: E731
    assert not finished()
    e = experiment.resolve(
        experiment.override(experiment.default_config(), {"steps": 2, "schedule.warmup_steps": 1}),
        find_text=False,
    )
    RunDirectory(tmp_path).write_config(e, {}, "hash of the data")
    for step, expected in ((1, False), (2, True)):
        writer = metrics.MetricsWriter(tmp_path / "metrics")
        writer.write("start", step - 1)
        writer.write("train", step, {"loss": 1.0})
        writer.close()
        assert finished() == expected


@pytest.mark.parametrize(
    "steps, losses, patience, expected",
    [
        (5, [], 0, False),
        (10, [], 0, True),
        (5, [1.0, 2.0, 3.0], 2, True),
        (5, [1.0, 2.0, 3.0], 3, False),
    ],
)
def test_the_end_of_a_run(steps, losses, patience, expected):
    story = [{"kind": "train", "step": step + 1, "loss": 1.0} for step in range(steps)]
    story += [{"kind": "evaluation", "step": steps, "loss": loss} for loss in losses]
    assert at_the_end(story, 10, patience) == expected
