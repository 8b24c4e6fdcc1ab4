"""How long it takes until the first step is done, cold and with what an earlier run has compiled; how long a
whole run takes; and whether depth adds to compiling.

  python -m benchmarks.startup [--text=tinyshakespeare.txt]

nanoGPT's CPU setting, by scripts/train.py in processes of their own, from the start of Python to the end of
the first dispatch (10 steps), the text prepared before, and once to its end with evaluations, checkpoints and
samples; imports alone; and scanned decoders of 8 and 64 layers, compiled in turn in one process without a
cache. Medians of --rounds. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import record
from llm_jax.mesh import make_layout
from llm_jax.planning.layout import dispatch
from llm_jax.training import experiment
from llm_jax.training.program import Program

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
DEPTHS = (8, 64)


def run(text: str, workdir: Path, cache: Path, whole: bool = False) -> float:
    """Seconds until nanoGPT's CPU setting says that its first dispatch is done, or until its process ends."""
    command = [*TRAIN, "--config=configs/shakespeare_char_cpu.py", f"--config.data.text={text}"]
    if not whole:
        command += ["--config.steps=10", "--config.schedule.warmup_steps=1", "--config.evaluation.batches=1"]
        command += ["--config.evaluation.every=0", "--config.checkpoint.every=0", "--config.samples.tokens=1"]
    for old in workdir.iterdir() if workdir.exists() else ():
        if old.is_dir() and old.name != "data":  # the prepared text
            shutil.rmtree(old)
        elif old.is_file():
            old.unlink()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    start = time.perf_counter()
    with subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, **pipes) as process:
        first = next((time.perf_counter() - start for line in process.stderr if line.startswith("step ")), 0)
        process.stderr.read()
    if process.returncode or not first:
        raise RuntimeError(f"{' '.join(command)} failed: {process.returncode}")
    return time.perf_counter() - start if whole else first


def imports() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import llm_jax.training.loop"], check=True, cwd=ROOT)
    return time.perf_counter() - start


def compile_seconds(depth: int) -> float:
    changes = {"data.text": ("python:docs",), "model.vocab_size": 256, "model.num_layers": depth,
               "model.model_dim": 128, "model.dtype": "float32"}  # fmt: skip
    e = experiment.resolve(experiment.override(experiment.default_config(), changes))
    e = experiment.complete(e, 256)
    program = Program(e, make_layout(e.mesh, jax.devices()[:1]), Path("unused"))
    start = time.perf_counter()
    program.lower(program.abstract_state(), dispatch(program)).compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="python:docs")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    text = str(Path(args.text).resolve()) if Path(args.text).exists() else args.text
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        run(text, workdir, Path(directory) / "first")  # prepares the text
        for number in range(args.rounds):
            cache = Path(directory) / f"cache{number}"
            for name in ("first step, cold", "first step, warm"):
                found.setdefault(name, []).append(run(text, workdir, cache))
            found.setdefault("imports", []).append(imports())
        found["whole run, cold"] = [run(text, workdir, Path(directory) / "last", whole=True)]
    jax.config.update("jax_enable_compilation_cache", False)
    for _ in range(args.rounds + 1):
        for depth in DEPTHS:
            found.setdefault(f"compile {depth} layers", []).append(compile_seconds(depth))
    for depth in DEPTHS:  # the first traces what jax then knows
        found[f"compile {depth} layers"].pop(0)
    medians = {name: round(statistics.median(values), 2) for name, values in found.items()}
    ratio = medians[f"compile {DEPTHS[1]} layers"] / medians[f"compile {DEPTHS[0]} layers"]
    for name, seconds in medians.items():
        print(f"{name:20} {seconds:6.2f} s   {', '.join(f'{x:.2f}' for x in found[name])}")
    print(f"64 layers are compiled in {ratio:.2f} times the time of 8")
    content = record.environment("jax", "jaxlib") | {"seconds": medians, "all": found, "depth_ratio": ratio}
    record.write("startup", content)


if __name__ == "__main__":
    main()
