"""The scripts of jobs, run against stand-ins for python and for the schedulers."""

import os
import signal
import subprocess
import time

import pytest
from launch_jobs import GOLDEN, JOBS, PYTHON, QUOTED, RUN, SCRIPTS, SWEEP, bash, emitted, lines

from llm_jax.planning import launch_gcloud
from llm_jax.planning.launch_job import Job, attempt
from llm_jax.planning.launch_slices import parse


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(name):
    assert subprocess.run(["bash", "-n", GOLDEN / name], capture_output=True).stderr == b""


@pytest.mark.parametrize(
    "code, finished, expected", [(0, 0, 0), (0, 1, 75), (2, 0, 2), (3, 0, 3), (137, 0, 137)]
)
def test_exit_code_of_an_attempt(stand_in, tmp_path, code, finished, expected):
    stand_in("python", PYTHON)
    job = Job(**RUN, topology=parse("v5p:4x4x8"))
    done = bash(attempt(job), env={**os.environ, "CODE": str(code), "FINISHED": str(finished)})
    assert done.returncode == expected, done.stderr
    asked = lines(tmp_path / "log")
    assert asked[:4] == list(job.command[1:])  # quotes, spaces, dollars and stars as they were
    assert asked[4:] == (["scripts/launch.py", "--finished=gs://b/llama_8b"] if code == 0 else [])


def test_attempt_ends_where_its_setup_or_its_time_does(stand_in, tmp_path):
    stand_in("python", 'echo started >> "$HERE/log"; exec sleep 20')
    failing = Job(**RUN, topology=parse("v5p:4x4x8"), setup=("true", "(exit 2)"))
    assert bash(attempt(failing)).returncode == 1 and not lines(tmp_path / "log")
    short = Job(**RUN, topology=parse("v5p:4x4x8"), max_hours=1e-6)
    assert bash(attempt(short)).returncode == 124 and lines(tmp_path / "log") == ["started"]


def test_sigterm_reaches_the_run_which_may_take_its_time(stand_in, tmp_path):
    stand_in(
        "python",
        """\
[ "$1" = scripts/launch.py ] && exit 1
trap 'sleep 0.3; touch "$HERE/saved"; exit 0' TERM
touch "$HERE/ready"
while true; do sleep 0.05; done""",
    )
    process = subprocess.Popen(["bash", "-c", attempt(Job(**RUN, topology=parse("v5p:4x4x8")))])
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75 and (tmp_path / "saved").exists()


LIST = "   0  0123456789abcdef  {}  optimizer.learning_rate=0.003\\n   1  ----------------  {}  a=1\\n"


@pytest.mark.parametrize(
    "listed, code",
    [
        (LIST.format("finished", "diverged"), 0),
        (LIST.format("finished", "unfinished"), 75),
        (LIST.format("waiting", "finished"), 75),
        ("", 75),
    ],
)
def test_a_sweep_is_finished_when_its_points_are(stand_in, listed, code):
    stand_in("python", f"[ \"${{@: -1}}\" != --list ] || printf '{listed}'")
    job = Job(**SWEEP | {"workdir": "gs://b/rates"}, topology=parse("v5e:2x4"))
    assert bash(attempt(job)).returncode == code


GCLOUD = """\
for verb in create describe delete ssh; do
  case " $* " in *" $verb "*) break ;; esac
done
last="${!#}"
case "$verb" in
  describe) exec cat "$HERE/state" ;;
  create) echo ACTIVE > "$HERE/state" ;;
  delete) rm "$HERE/state" ;;
esac
echo "$verb" >> "$HERE/log"
[ "$verb" != ssh ] || exec bash -c "${last#--command=}"
"""


def gcloud(stand_in, tmp_path, python, name="gcloud_slices.sh"):
    """A script around a gcloud whose machines, one a slice, are this one; gives what was asked of it."""
    stand_in("gcloud", GCLOUD)
    stand_in("sleep", "exit 0")
    stand_in("python", python)
    done = bash(emitted(name).replace("/tmp/llama-8b.pid", "$HERE/pid.$$"))
    return done, lines(tmp_path / "log")


def test_gcloud_books_again_after_a_preemption_until_the_run_is_finished(stand_in, tmp_path):
    python = """\
[ "$1" = scripts/launch.py ] && exit 0
echo x >> "$HERE/starts"
if [ "$(wc -l < "$HERE/starts")" -le 2 ]; then echo SUSPENDED > "$HERE/state"; exit 3; fi"""
    done, asked = gcloud(stand_in, tmp_path, python)
    assert done.returncode == 0 and "is finished" in done.stderr, done.stderr
    assert asked == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh", "delete"]


def test_gcloud_gives_the_machines_back_where_no_retry_would_help(stand_in, tmp_path):
    done, asked = gcloud(stand_in, tmp_path, "exit 2")
    assert done.returncode == 2 and "cannot go on" in done.stderr
    assert asked == ["create", "ssh", "ssh", "delete"]


def test_gcloud_gives_up_after_its_retries(stand_in, tmp_path):
    done, asked = gcloud(stand_in, tmp_path, "exit 3")
    assert done.returncode == 1 and asked == ["create", *["ssh"] * 2 * 51, "delete"]


def test_gcloud_ends_an_attempt_that_lost_its_connection(stand_in, tmp_path):
    stand_in("python", "exit 0")
    start = launch_gcloud.first_end_the_old(JOBS["gcloud.sh"][1]).replace("/tmp/", f"{tmp_path}/")
    with subprocess.Popen(["sleep", "20"]) as old:
        (tmp_path / "llama-8b.pid").write_text(str(old.pid))
        new = subprocess.Popen(["bash", "-c", start + "exit 7"])
        assert old.wait(timeout=60) == -signal.SIGTERM  # and it is gone for the script, too
        assert new.wait(timeout=60) == 7
    assert (tmp_path / "llama-8b.pid").read_text() == f"{new.pid}\n"


SLURM = {
    "scancel": 'echo "scancel $*" >> "$HERE/log"; kill -TERM "$(cat "$HERE/task")"',
    "scontrol": 'echo "scontrol $*" >> "$HERE/log"',
    "squeue": 'echo "${STATE:-RUNNING}"',
    "srun": 'shift; echo "$BASHPID" > "$HERE/task"; exec "$@"',
}


@pytest.mark.parametrize(
    "code, finished, state, restarts, expected, requeued",
    [
        (0, 0, "RUNNING", 0, 0, False),
        (0, 1, "RUNNING", 0, 75, True),
        (0, 1, "COMPLETING", 0, 75, False),  # scancel, or SLURM requeues it by itself
        (3, 1, "RUNNING", 49, 3, True),
        (3, 1, "RUNNING", 50, 3, False),
        (2, 1, "RUNNING", 0, 2, False),
    ],
)
def test_slurm_requeues_what_can_go_on(
    stand_in, tmp_path, code, finished, state, restarts, expected, requeued
):
    for name, body in SLURM.items():
        stand_in(name, body)
    stand_in("module", "exit 0")
    stand_in("python", PYTHON)
    environment = {"CODE": code, "FINISHED": finished, "STATE": state, "SLURM_RESTART_COUNT": restarts}
    environment |= {"SLURM_JOB_ID": 7}
    done = bash(emitted("slurm.sh"), env=os.environ | {k: str(v) for k, v in environment.items()})
    assert done.returncode == expected, done.stderr
    assert ("scontrol requeue 7" in lines(tmp_path / "log")) == requeued
    assert QUOTED in lines(tmp_path / "log")


def test_slurm_tells_a_run_to_save_before_its_time_is_up(stand_in, tmp_path):
    for name, body in SLURM.items():
        stand_in(name, body)
    stand_in(
        "python",
        """\
case "$*" in *--list) echo "0 abc unfinished"; exit ;; esac
echo "$*" >> "$HERE/log"
trap 'sleep 0.2; touch "$HERE/saved"; exit 0' TERM
touch "$HERE/ready"
while true; do sleep 0.05; done""",
    )
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}
    process = subprocess.Popen(["bash", "-c", emitted("slurm_sweep.sh")], env=environment)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75 and (tmp_path / "saved").exists()
    asked = lines(tmp_path / "log")
    assert asked[0].endswith("--workdir=runs/rates --index=4")
    assert asked[1:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]
