"""SIGKILL at random instants: the run that is started again ends in the same bits as one never stopped.

  python -m benchmarks.reliability.kills
  python -m benchmarks.reliability.kills --kills=6 --seed=1 --only=muon

Half of the kills come at an instant drawn uniformly from the wall time of a whole run, the others when the
files show that something delicate is under way. After a kill the same command starts again, in a third of
the runs to be killed once more, until it ends. Compared with a run that was never stopped: the story of the
metrics without wall-clock values, samples.txt, and every array of the final checkpoint (parameters,
optimiser state, running mean, step), by their bytes. Every tenth run is of scripts/prepare_data.py,
whose files are compared. Exits 1 unless all are identical. Writes benchmarks/results/reliability_kills.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.reliability import harness
from benchmarks.reliability.harness import EVERY
from llm_jax import storage
from llm_jax.training import metrics
from llm_jax.training.checkpoint import MANIFEST
from llm_jax.training.rundir import RunDirectory

# {variant: (config, what it sets)}; "mixture" stands for the flags of two sources and an evaluation set.
VARIANTS = {
    "clm": ("tiny_clm", {}),
    "clm_one_device": ("tiny_clm", {"mesh.cpu_devices": 1, "checkpoint.keep_best": 1}),
    "mlm": ("tiny_mlm", {"accumulation": 2, "model.dropout": 0.1}),
    "mixture": ("tiny_clm", {"mixture": True, "ema_decay": 0.9, "model.scan_layers": True}),
    "muon": ("tiny_clm", {"optimizer": "muon", "steps_per_dispatch": 5, "checkpoint.keep_best": 1}),
    "mlm_all": (
        "tiny_mlm",
        {
            **{"mixture": True, "accumulation": 4, "steps_per_dispatch": 5, "mesh.fsdp": 2},
            **{"optimizer": "muon", "ema_decay": 0.9, "model.dropout": 0.1},
            **{"checkpoint.keep_best": 2, "checkpoint.keep_every": 40},
        },
    ),
}
PREPARE = "prepare_data"
EARLY = ("preparing", "config")  # happen once, at the beginning
AIMS = ("saving", "evaluating", "preparing", "sealing", "samples", "removing", "config", "report")
DELAY = {"preparing": 0.1, "saving": 0.02, "evaluating": 0.05}  # seconds, how deep a kill may strike
TRIES = 6


@dataclass
class Kill:
    """under_way: what the files of the killed run say; step: the last one that was written down."""

    number: int
    run: int
    variant: str
    aim: str
    under_way: str
    step: int
    seconds: float
    identical: bool = False


@dataclass(frozen=True)
class Watch:
    """What a training process is doing, from its files alone. before: left-overs of an earlier kill."""

    run: RunDirectory
    segments: int
    before: frozenset[Path]

    @classmethod
    def begin(cls, workdir: Path) -> Watch:
        run = RunDirectory(workdir)
        return cls(run, len(metrics.segments(run.metrics)), frozenset(leftovers(run)))

    def __call__(self) -> str:
        being_written = [path.name for path in leftovers(self.run) if path not in self.before]
        for what in ("data", "config", "environment", "samples", "report"):
            if any(name.startswith(f".{what}.") for name in being_written):
                return {"data": "preparing", "environment": "config"}.get(what, what)
        if any(name.startswith(".test.") for name in being_written):
            return "preparing"
        segments = metrics.segments(self.run.metrics)
        if len(segments) == self.segments:
            return "starting"
        return checkpointing(self.run) or after(last_record(segments[-1]), self.run)


def leftovers(run: RunDirectory) -> list[Path]:
    return storage.leftovers(run.path) + storage.leftovers(run.data)


def checkpointing(run: RunDirectory) -> str:
    """What is happening to checkpoints, "" for nothing."""
    steps = sorted(path for path in run.checkpoints.glob("[0-9]*") if path.is_dir())
    sealed = [path for path in steps if (path / MANIFEST).exists()]
    for path in steps:
        if path not in sealed:
            if sealed and path < sealed[-1]:
                return "removing"
            return "sealing" if (path / "state").exists() else "saving"
    return ""


def last_record(segment: Path) -> metrics.Record:
    lines = segment.read_text().splitlines() or ["{}"]
    for line in reversed(lines[-2:]):  # the last may be half a line
        if line.endswith("}"):
            return json.loads(line)
    return {}


def after(record: metrics.Record, run: RunDirectory) -> str:
    """What follows a record. A step is written after the one behind it was sent off, but for the step
    before a pause; so one that is written and due for evaluation is being evaluated."""
    kind, step = record.get("kind"), record.get("step", 0)
    if kind == "train" and step % EVERY == 0:
        return "evaluating"
    if kind == "evaluation" and f"=== step {step} ===" not in (
        run.samples.read_text() if run.samples.exists() else ""
    ):
        return "samples"
    return "ending" if kind == "end" else "stepping"


def strike(
    process: subprocess.Popen, aim: str, instant: float, watch: Callable[[], str], draw: random.Random
) -> float | None:
    """Kills at ``instant`` (seconds), or later at the first sight of ``aim``; gives the seconds, or None
    when the process came to its end first."""
    began = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - began >= instant and (aim == "random" or watch() == aim):
            time.sleep(draw.uniform(0, DELAY.get(aim, 0)))
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    return time.monotonic() - began if process.wait() == -signal.SIGKILL else None


class Proof:
    """Runs, kills and compares under one directory."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.texts, self.cache = root / "texts", root / "cache"
        self.walls: dict[str, float] = {}
        self.runs = itertools.count(1)
        harness.write_texts(self.texts, seed)

    def command(self, variant: str, workdir: Path) -> list[str]:
        if variant == PREPARE:
            values = harness.mixture(self.texts) | {"tokenizer": "sentencepiece", "tokenizer.vocab_size": 300}
            flags = [f"--config={harness.ROOT}/configs/tiny_clm.py", f"--output={workdir}/data"]
            return harness.script("prepare_data.py", *flags, *harness.flags(values))
        config, changes = VARIANTS[variant]
        values = {**harness.TINY, "data.text": str(self.texts / "a.jsonl"), **changes}
        if values.pop("mixture", False):
            del values["data.text"]
            values |= harness.mixture(self.texts)
        flags = [f"--config={harness.ROOT}/configs/{config}.py", f"--workdir={workdir}"]
        return harness.script("train.py", *flags, *harness.flags(values))

    def start(self, variant: str, workdir: Path) -> subprocess.Popen:
        log = self.root / f"{workdir.name}.log"
        return harness.start(self.command(variant, workdir), log, self.cache)

    def finish(self, variant: str, workdir: Path) -> None:
        if self.start(variant, workdir).wait() != 0:
            raise SystemExit(f"{variant} failed:\n{(self.root / f'{workdir.name}.log').read_text()[-3000:]}")

    def whole(self, variant: str) -> Path:
        """A run that is never stopped; made twice, to know its time and that it is the same twice."""
        workdir = self.root / f"whole_{variant}"
        if variant not in self.walls:
            again = self.root / f"again_{variant}"
            self.finish(variant, workdir)
            began = time.monotonic()
            self.finish(variant, again)
            self.walls[variant] = time.monotonic() - began
            if found := self.compare(variant, workdir, again):
                raise SystemExit(f"{variant} differs between two whole runs: {', '.join(found)}")
        return workdir

    def compare(self, variant: str, whole: Path, cut: Path) -> list[str]:
        return (differing_files if variant == PREPARE else harness.differences)(whole, cut)

    def case(self, variant: str, aim: str, kills: list[Kill], most: int) -> None:
        """One run, killed at least once and at most ``most`` times; adds its kills."""
        whole, again = self.whole(variant), self.draw.random() < 1 / 3
        for attempt in range(TRIES):
            number = next(self.runs)
            workdir = self.root / f"run_{number}"
            share = 0.0 if aim in EARLY else 1.0 if aim == "random" else 0.7 * 0.5**attempt
            mine = self.kill(variant, aim, share, workdir, len(kills) + 1, number)
            if mine:
                break
        else:
            raise SystemExit(f"{variant} was not seen {aim} in {TRIES} runs")
        if again and len(mine) < most:
            mine += self.kill(variant, "random", 0.7, workdir, len(kills) + 2, number)
        self.finish(variant, workdir)
        found = self.compare(variant, whole, workdir)
        for kill in mine:
            kill.identical = not found
            print(f"kill {kill.number:3}  run {number:3}  {variant:15} aimed at {kill.aim:10} ", end="")
            print(f"{kill.under_way:10} step {kill.step:4} after {kill.seconds:5.2f} s  ", end="")
            print("identical" if not found else f"DIFFERENT: {', '.join(found[:4])}", flush=True)
        kills += mine
        if not found:
            shutil.rmtree(workdir)

    def kill(self, variant: str, aim: str, share: float, workdir: Path, number: int, run: int) -> list[Kill]:
        """Starts and kills. share: of the wall time of a whole run, within which the instant lies.
        Gives [] when the process ended before."""
        watch = preparing(workdir) if variant == PREPARE else Watch.begin(workdir)
        instant = self.draw.uniform(0, share * self.walls[variant])
        seconds = strike(self.start(variant, workdir), aim, instant, watch, self.draw)
        if seconds is None:
            return []
        segments = metrics.segments(workdir / "metrics")
        step = last_record(segments[-1]).get("step", 0) if segments else 0
        return [Kill(number, run, variant, aim, watch(), step, round(seconds, 2))]


def preparing(workdir: Path) -> Callable[[], str]:
    """What scripts/prepare_data.py is doing."""
    before = frozenset(storage.leftovers(workdir))

    def watch() -> str:
        return "preparing" if {*storage.leftovers(workdir)} - before else "starting"

    return watch


def differing_files(whole: Path, cut: Path) -> list[str]:
    """Files of two directories that are not the same bytes in both."""
    trees = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (whole, cut)]
    names = sorted({*trees[0], *trees[1]})
    return [str(name) for name in names if trees[0].get(name) != trees[1].get(name)]


def plan(only: str) -> Iterator[tuple[str, str]]:
    """(variant, aim) of every run, without end: chance and aims by turns, of each all variants by turns."""
    by_chance, aimed_at = (itertools.cycle([only] if only else VARIANTS) for _ in range(2))
    aims = itertools.cycle(AIMS)
    for number in itertools.count():
        if only == PREPARE or (not only and number % 10 == 9):
            yield PREPARE, "preparing"
        elif number % 2:
            yield next(aimed_at), next(aims)
        else:
            yield next(by_chance), "random"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *VARIANTS, PREPARE], help="one variant")
    args = parser.parse_args()
    began, kills = time.monotonic(), []
    root = Path(tempfile.mkdtemp(prefix="llm_jax_kills_"))
    proof = Proof(root, args.seed)
    cases = plan(args.only)
    while len(kills) < args.kills:
        proof.case(*next(cases), kills, args.kills - len(kills))
    identical = sum(kill.identical for kill in kills)
    under_way = Counter(kill.under_way for kill in kills)
    summary = ", ".join(f"{what} {count}" for what, count in under_way.most_common())
    print(f"{identical} of {len(kills)} identical; killed while {summary}")
    content = {
        **record.environment("jax", "orbax-checkpoint"),
        "seed": args.seed,
        "kills": len(kills),
        "runs": len({kill.run for kill in kills}),
        "identical": identical,
        "under_way": dict(under_way.most_common()),
        "variants": dict(Counter(kill.variant for kill in kills)),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "passed": identical == len(kills),
        "table": [asdict(kill) for kill in kills],
    }
    record.write("reliability_kills", content)
    if not content["passed"]:
        sys.exit(f"what differs is in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
