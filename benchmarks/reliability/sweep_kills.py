"""SIGKILL at random instants of a sweep: started again it ends in the same table and the same bits.

  python -m benchmarks.reliability.sweep_kills
  python -m benchmarks.reliability.sweep_kills --kills=2 --seed=1

The shipped example, six points by two workers, made short. A kill comes at an instant drawn uniformly from
the wall time of a whole sweep and ends all its processes or, one in three, scripts/sweep.py alone: then the
training processes live on, and the next start has to leave them their points. A sweep is killed up to three
times, then started until every point is finished. Compared with a sweep that was never stopped: both tables
without their columns of time and device, and of every point the story of the metrics without wall-clock
values, samples.txt and every array of the final checkpoint, by their bytes. Exits 1 unless all are identical.
Writes benchmarks/results/reliability_sweep_kills.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.reliability import harness
from llm_jax import storage
from llm_jax.scaling.table import APART

POINTS, WORKERS, MOST = 6, 2, 3
PATIENCE = 300  # seconds, for processes that live on


@dataclass
class Kill:
    """of: "all" its processes, or "sweep.py" alone; finished, begun: points, when it came."""

    number: int
    sweep: int
    of: str
    finished: int
    begun: int
    seconds: float
    identical: bool = False


class Proof:
    """Sweeps, kills and compares under one directory."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        harness.write_texts(root / "texts", seed, documents=60)
        self.whole = root / "whole"
        self.finish(self.whole)
        began = time.monotonic()
        self.finish(root / "again")  # what the first one compiled this one need not, like those to be killed
        self.wall = time.monotonic() - began
        if found := differences(self.whole, root / "again"):
            raise SystemExit(f"two whole sweeps differ: {', '.join(found)}")
        print(f"a whole sweep takes {self.wall:.1f} s", flush=True)

    def start(self, workdir: Path) -> subprocess.Popen:
        values = {**harness.TINY, "data.text": str(self.root / "texts" / "a.jsonl")}
        del values["model.model_dim"]  # the sweep sets it
        flags = [f"--config={harness.ROOT}/configs/sweep_learning_rate.py", f"--workdir={workdir}"]
        command = harness.script("sweep.py", *flags, f"--workers={WORKERS}", *harness.flags(values))
        return harness.start(command, self.root / f"{workdir.name}.log", self.root / "cache", session=True)

    def finish(self, workdir: Path) -> None:
        """Starts it until every point is finished."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            code = self.start(workdir).wait()
            if code or count(workdir, "finished") == POINTS:
                break
            time.sleep(1)
        if code or count(workdir, "finished") != POINTS:
            log = self.root / f"{workdir.name}.log"
            raise SystemExit(f"the sweep failed (exit code {code}):\n{log.read_text()[-3000:]}")

    def case(self, number: int, kills: list[Kill], most: int) -> None:
        """One sweep, killed up to ``most`` times; adds its kills."""
        workdir, mine = self.root / f"sweep_{number}", []
        for _ in range(most):
            process, began = self.start(workdir), time.monotonic()
            instant = self.draw.uniform(0, self.wall)
            of = self.draw.choice(("all", "all", "sweep.py"))
            with suppress(subprocess.TimeoutExpired):
                process.wait(instant)
            if process.poll() is not None:
                break
            state = count(workdir, "finished"), len(list(workdir.glob("runs/*/config.json")))
            kill(process, everything=of == "all")
            seconds = round(time.monotonic() - began, 2)
            mine.append(Kill(len(kills) + len(mine) + 1, number, of, *state, seconds))
        self.finish(workdir)
        found = differences(self.whole, workdir)
        for each in mine:
            each.identical = not found
            print(each, "" if not found else f"DIFFERENT: {', '.join(found[:4])}", flush=True)
        kills += mine


def kill(process: subprocess.Popen, everything: bool) -> None:
    """SIGKILL to the sweep and, of what it has started, to every process of its session."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    if everything:
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError):
                if os.getsid(int(path.name)) == process.pid:
                    os.kill(int(path.name), signal.SIGKILL)


def count(workdir: Path, status: str) -> int:
    """Points of a status."""
    outcomes = (json.loads(path.read_text()) for path in workdir.glob("points/*/outcome.json"))
    return sum(outcome["status"] == status for outcome in outcomes)


def differences(whole: Path, cut: Path) -> list[str]:
    """What of a sweep that was stopped is not as in one that never was; [] when all bits are the same."""
    found = [] if table(whole) == table(cut) else ["table.jsonl"]
    found += [] if table_csv(whole) == table_csv(cut) else ["table.csv"]
    names = {path.name for path in (whole / "runs").iterdir()}
    if names != {path.name for path in (cut / "runs").iterdir()}:
        return [*found, "the names of the runs"]
    for name in sorted(names):
        one, other = whole / "runs" / name, cut / "runs" / name
        found += [f"{name}: {what}" for what in harness.differences(one, other)]
    places = [cut, cut / "data", *(cut / "points").iterdir()]
    return found + [f"{path} is left over" for place in places for path in storage.leftovers(place)]


def table(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "table.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in APART} for row in rows]


def table_csv(workdir: Path) -> list[dict]:
    with (workdir / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key.partition(".")[0] not in APART} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, kills, number = time.monotonic(), [], 0
    root = Path(tempfile.mkdtemp(prefix="llm_jax_sweep_kills_"))
    proof = Proof(root, args.seed)
    while len(kills) < args.kills:
        number += 1
        proof.case(number, kills, min(MOST, args.kills - len(kills)))
    identical = sum(kill.identical for kill in kills)
    print(f"{identical} of {len(kills)} identical")
    content = {
        **record.environment("jax", "orbax-checkpoint"),
        "seed": args.seed,
        "points": POINTS,
        "workers": WORKERS,
        "kills": len(kills),
        "sweeps": number,
        "identical": identical,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "passed": identical == len(kills),
        "table": [asdict(kill) for kill in kills],
    }
    record.write("reliability_sweep_kills", content)
    if not content["passed"]:
        sys.exit(f"what differs is in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
