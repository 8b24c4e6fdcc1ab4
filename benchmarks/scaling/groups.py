"""What it saves to train the equal-shaped points of a sweep as one program.

  python -m benchmarks.scaling.groups [--steps=300]

Eight points, two rates at four seeds, of the smallest size of the CPU ladder: each by scripts/train.py in a
process of its own, two at a time, as scripts/sweep.py --workers=2 does it; by two processes of
scripts/train_together.py at a time, each with half of the points and one core; and by one of them with all
points and both cores, on a mesh of two devices. From the start of the first process to the end of the last:
cold, with nothing compiled yet, and warm, with what the cold start has compiled, for other seeds. ``cpu``:
seconds of all processes on all cores, which other work on the machine changes less. ``loss``: the largest
relative difference to the points by themselves.

Then the milliseconds of a step of one run on one core, of two sizes: alone, and of four runs one after
another and at once. Writes benchmarks/results/groups.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from benchmarks import record
from llm_jax import cli
from llm_jax.scaling import groups, workers
from llm_jax.scaling.points import grid
from llm_jax.scaling.sweep import Point, Sweep, resolve
from llm_jax.training import metrics
from llm_jax.training.experiment import default_config
from llm_jax.training.program import Program
from llm_jax.training.together import Together

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("32x2", "64x3")  # width x layers; the sweep has the first
STEP_MEMBERS, STEP_DISPATCHES = 4, 5


def get_config(size=SIZES[0]):
    width, layers = map(int, size.split("x"))
    config = default_config(tokenizer="byte")
    config.data.text = ("python:source",)
    config.data.sequence_length = 128
    config.global_batch_size = 16
    config.steps_per_dispatch = 10
    config.evaluation.batches = 50
    config.samples.tokens = 1
    config.model.model_dim = width
    config.model.num_layers = layers
    config.model.num_heads = width // 32
    config.model.scan_layers = False
    return config


def sweep(first):
    return grid({"optimizer.learning_rate": (3e-3, 1e-2), "seed": range(first, first + 4)})


def losses(sweep: Sweep) -> list[float]:
    stories = (metrics.read(sweep.directory(point).run.metrics) for point in sweep.points)
    return [metrics.evaluations(story)[-1]["loss"] for story in stories]


def by_themselves(sweep: Sweep) -> None:
    """As workers.py does with --workers=2, without its second of waiting and its reports between."""
    queue, running = list(sweep.points), {}
    while queue or running:
        for slot in {0, 1} - {*running}:
            if queue:
                running[slot] = start(sweep, (queue.pop(0),), workers.share(slot, 2), "train.py")
        time.sleep(workers.POLL_SECONDS)
        for slot, process in list(running.items()):
            if process.poll() is not None:
                finish(running.pop(slot))


def halves(sweep: Sweep) -> None:
    found = groups.settle(sweep, sweep.points, 8, workers=2)
    for process in [start(sweep, group, workers.share(slot, 2)) for slot, group in enumerate(found)]:
        finish(process)


def whole(sweep: Sweep) -> None:
    finish(start(sweep, sweep.points, workers.share(0, 1)))


WAYS = {"by themselves": by_themselves, "two groups of 4": halves, "one group of 8": whole}


def start(
    sweep: Sweep, points: tuple[Point, ...], cores: set[int], script: str = "train_together.py"
) -> subprocess.Popen:
    flags = []
    for point in points:
        directory = sweep.directory(point)
        directory.make()
        sweep.write_config(point, directory)
        flags += [f"--config={directory.config}", f"--workdir={directory.run.path}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts" / script), *flags], **quiet)
    os.sched_setaffinity(process.pid, cores)
    return process


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise RuntimeError(f"{process.args} ended with {process.returncode}")


def timed(way: Callable[[Sweep], None], sweep: Sweep) -> dict[str, float]:
    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    sweep.prepare(sweep.points, lambda _: None)
    began, before = time.perf_counter(), cpu()
    way(sweep)
    return {"seconds": round(time.perf_counter() - began, 1), "cpu": round(cpu() - before, 1)}


def measure(steps: int, root: Path) -> dict[str, dict[str, float]]:
    found, truth = {}, []
    for name, way in WAYS.items():
        os.environ["XDG_CACHE_HOME"] = str(root / name / "cache")
        for state, first in (("cold", 0), ("warm", 4)):
            place = Sweep(root / name / state, resolve(get_config(), sweep(first), {"steps": steps}))
            row = timed(way, place)
            if state == "cold":
                truth = truth or losses(place)
                row["loss"] = max(abs(a - b) / b for a, b in zip(losses(place), truth, strict=True))
            found[f"{name}, {state}"] = row
            print(name, state, row, flush=True)
    return found


def step_ms(size: str, root: Path) -> dict[str, float]:
    """Milliseconds a run and step, the best of three; in a process with one core."""
    config = get_config(size)
    config.mesh.cpu_devices = 1
    points = resolve(config, sweep(0), {})
    program = Program.prepare(points[0].experiment, root / "data", say=lambda _: None)
    programs = [replace(program, experiment=replace(program.experiment, seed=i)) for i in range(STEP_MEMBERS)]
    batches = [each.batches[0] for each in programs]
    one, several = program.init(), Together(tuple(programs), False)
    stacked = several.stack(several.init())
    at_once = Together(tuple(programs), True)

    def best(step: Callable, state: object, batch: object, members: int) -> float:
        state, times = jax.block_until_ready(step(state, batch)[0]), []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(STEP_DISPATCHES):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - began)
        steps = STEP_DISPATCHES * program.experiment.steps_per_dispatch * members
        return round(1e3 * min(times) / steps, 2)

    copy = jax.tree.map(lambda x: x.copy(), stacked)
    return {
        "alone": best(program.steps, one, batches[0], 1),
        "one after another": best(several.steps, stacked, batches, STEP_MEMBERS),
        "at once": best(at_once.steps, copy, batches, STEP_MEMBERS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", help="only the last part, of this size, as JSON: for this benchmark")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if args.step_ms:
            print(json.dumps(step_ms(args.step_ms, root)))
            return
        found, step_times = measure(args.steps, root), {}
        for size in SIZES:
            command = [sys.executable, "-m", "benchmarks.scaling.groups", f"--step-ms={size}"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            os.sched_setaffinity(process.pid, {0})
            step_times[size] = json.loads(process.communicate()[0])
            print(size, step_times[size], flush=True)
    content = record.environment("jax", "jaxlib") | {"size": SIZES[0], "points": 8, "steps": args.steps}
    content |= {"sweep": found, "step_ms": step_times}
    record.write("groups", content)


if __name__ == "__main__":
    cli.main(main)
