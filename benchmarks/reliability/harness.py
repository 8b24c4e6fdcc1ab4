"""Small runs to be started, watched, killed, damaged and compared: what the proofs of reliability share."""

from __future__ import annotations

import io
import json
import os
import random
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from llm_jax import storage
from llm_jax.training import metrics
from llm_jax.training.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
EVERY = 20  # steps between evaluations, checkpoints and samples
STEPS = 120

# Of every run. Two devices on the CPU, so that sums cross devices.
TINY = {
    "steps": STEPS,
    "global_batch_size": 16,
    "steps_per_dispatch": 1,
    "mesh.cpu_devices": 2,
    "model.num_layers": 1,
    "model.model_dim": 16,
    "schedule.warmup_steps": 5,
    "evaluation.every": EVERY,
    "evaluation.batches": 8,
    "checkpoint.every": EVERY,
    "samples.every": EVERY,
    "samples.tokens": 5,
}


def write_texts(directory: Path, seed: int, documents: int = 600) -> None:
    """a.jsonl, b.jsonl and news.jsonl: seeded text, some 0.5 MB each with 600 documents."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b", "news"):
        draw = random.Random(f"{seed} {name}")
        words = [
            "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(400)
        ]
        texts = (" ".join(draw.choices(words, k=draw.randint(40, 200))) for _ in range(documents))
        lines = "".join(json.dumps({"text": f"{text}.\n"}) + "\n" for text in texts)
        (directory / f"{name}.jsonl").write_text(lines)


def mixture(texts: Path) -> dict[str, object]:
    """Two sources and an evaluation set."""
    sources = [
        {"name": "a", "text": (str(texts / "a.jsonl"),), "weight": 3.0},
        {"name": "b", "text": (str(texts / "b.jsonl"),)},
    ]
    return {"data.sources": tuple(sources), "evaluation.sets": (news(texts),)}


def news(texts: Path) -> dict[str, object]:
    return {"name": "news", "text": (str(texts / "news.jsonl"),)}


def flags(values: dict[str, object]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / name), *arguments]


def start(command: list[str], log: Path, cache: Path, session: bool = False) -> subprocess.Popen:
    """Starts a script in a process of its own. What one process compiles the next need not.

    session: with one of its own too, by which all that it starts can be found.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=session)


def prepare_calls(cache: Path) -> None:
    """For ``call``: the CPU, and a place for what is compiled."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def call(name: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a script in this process; gives its exit code, output and errors, as a user would see them."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(output), redirect_stderr(errors), mock.patch.object(sys, "argv", [name, *arguments]):
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:  # a bug, which a user would see as a traceback
            traceback.print_exc()
            code = 1
    return code, output.getvalue(), errors.getvalue()


def story(workdir: Path) -> list[metrics.Record]:
    """What a run tells, without wall-clock values."""
    return metrics.without_time(metrics.read(RunDirectory(workdir).metrics))


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, read by orbax itself and not by the code that is proved here."""
    newest = max(path for path in RunDirectory(workdir).checkpoints.iterdir() if path.name.isdecimal())
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(newest / "state").item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = reader.restore(newest / "state", args=ocp.args.PyTreeRestore(restore_args=numpy))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {newest.name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def differences(whole: Path, cut: Path) -> list[str]:
    """What of a run that was stopped is not as in one that never was; [] when all bits are the same."""
    one, other = RunDirectory(whole), RunDirectory(cut)
    found = [] if story(whole) == story(cut) else ["metrics"]
    if one.samples.read_bytes() != other.samples.read_bytes():
        found.append("samples")
    expected, got = arrays(whole), arrays(cut)
    names = sorted({*expected, *got})
    found += [name for name in names if not same_bits(expected.get(name), got.get(name))]
    return found + [f"{path.name} is left over" for path in storage.leftovers(cut)]


def same_bits(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return False
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
