"""One flipped bit or byte, in any file of a checkpoint or shard set, is named before a result is given out.

  python -m benchmarks.reliability.flips
  python -m benchmarks.reliability.flips --flips=20 --seed=1

A small run is trained (two sources, an evaluation set, a running mean). Every case damages one file of a copy
of it and starts a script that reads that file: scripts/generate.py, evaluate.py, train.py (which goes on, or
begins from the checkpoint) or prepare_data.py --verify. It must end with exit code 2 and one line that names
the file; nothing on standard output, no step told that the undamaged run did not tell. Flips go over all
kinds of files by turns. Beside them every kind of file is once cut short, emptied and removed; directories
get a file that does not belong there; and what a kill leaves half written is put in place. These are named,
or change no result. Exits 1 unless all flips are named. Writes benchmarks/results/reliability_flips.json.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.reliability import harness
from llm_jax.training import metrics
from llm_jax.training.checkpoint import MANIFEST

STEPS, MORE = 8, 40  # of the run, and where it is told to go on to
CHECKPOINT = ("generate", "evaluate", "resume", "begin from")
BOTH = ("generate", "evaluate", "resume", "verify")
GOOD = {"named", "harmless", "counts as absent"}  # of damage that may leave nothing to name


def kind_of(path: Path) -> str:
    """What kind of file it is, of a path in a run directory: the names of sources and steps, and the hashes
    that orbax chooses, do not count."""
    if path.parts[0] == "checkpoints":
        return "checkpoint/" + re.sub(r"[0-9a-f]{32}", "*", "/".join(path.parts[2:]))
    role, _, rest = path.name.partition(".")
    return f"shards/{role}.{rest}" if rest == "json" else f"shards/{role}.*.{path.suffix[1:]}"


def readers_of(kind: str) -> tuple[str, ...]:
    if kind.startswith("checkpoint/"):
        return CHECKPOINT
    if kind.endswith(".json"):
        return BOTH
    return ("resume", "verify") if kind.startswith("shards/train.") else ("evaluate", "verify")


@dataclass
class Case:
    """One damage. outcome: named, harmless (the results are the undamaged run's), counts as absent (the
    results are those without it), or what was wrong."""

    damage: str
    kind: str
    reader: str
    outcome: str
    message: str


class Proof:
    """The undamaged run, what its readers say of it, and copies to damage."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.run, self.copy = root, root / "run", root / "copy"
        harness.write_texts(root / "texts", seed, documents=200)
        self.values = {
            **harness.TINY,
            **harness.mixture(root / "texts"),
            **{"steps": STEPS, "ema_decay": 0.9, "samples.every": 0, "evaluation.batches": 0},
            **{"evaluation.every": STEPS, "checkpoint.every": STEPS // 2},
        }
        code, _, errors = harness.call("train.py", *self.train(self.run))
        if code:
            raise SystemExit(f"the undamaged run failed: {errors}")
        self.expected = {reader: self.read(reader) for reader in {*CHECKPOINT, *BOTH}}
        self.files = [path.relative_to(self.run) for path in self.newest.rglob("*") if path.is_file()]
        self.files += [path.relative_to(self.run) for path in (self.run / "data").iterdir()]

    @property
    def newest(self) -> Path:
        return self.run / "checkpoints" / f"{STEPS:08d}"

    def kinds(self) -> dict[str, list[Path]]:
        """{kind: its files}, paths in the run directory."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.files):
            found.setdefault(kind_of(path), []).append(path)
        return found

    def train(self, workdir: Path, **changes: object) -> list[str]:
        values = {**self.values, **changes}
        config = f"--config={harness.ROOT}/configs/tiny_clm.py"
        return [config, f"--workdir={workdir}", *harness.flags(values)]

    def read(
        self, reader: str, damage: Callable[[], None] = lambda: None
    ) -> tuple[int, str, str, list[metrics.Record]]:
        """Exit code, output, errors and story of a script on a damaged copy."""
        for path in (self.copy, self.root / "begun"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.run, self.copy)
        damage()
        workdir = f"--workdir={self.copy}"
        commands = {
            "generate": ("generate.py", workdir, "--tokens=40"),
            "evaluate": ("evaluate.py", workdir),
            "resume": ("train.py", *self.train(self.copy, steps=MORE), "--extend"),
            "same command": ("train.py", *self.train(self.copy)),
            "begin from": ("train.py", *self.train(self.root / "begun", init_from=self.copy)),
            "verify": ("prepare_data.py", f"--verify={self.copy / 'data'}"),
        }
        result = harness.call(*commands[reader])
        return *result, harness.story(self.root / "begun" if reader == "begin from" else self.copy)

    def case(self, damage: str, path: Path, reader: str, change: Callable[[Path], None]) -> Case:
        """path: of the damaged file in the run directory; change: does the damage to its copy."""
        here = self.copy / path
        code, output, errors, story = self.read(reader, lambda: change(here))
        _, whole_output, _, whole_story = self.expected[reader]
        message = errors.splitlines()[-1] if errors else ""
        if code == 0 and (output, story) == (whole_output, whole_story):
            outcome = "harmless"
        elif code == 0:
            outcome = "unnoticed"
        elif code != 2 or "Traceback" in errors:
            outcome = f"exit code {code}"
        elif output or story != whole_story[: len(story)]:
            outcome = "results were given out"
        elif message.startswith("error: ") and re.search(rf"{re.escape(str(here))}(?![\w./])", message):
            outcome = "named"
        else:
            outcome = "another file is named"
        return Case(damage, kind_of(path), reader, outcome, message.replace(str(self.copy), "RUN"))

    def half_written(self, reader: str) -> Case:
        """The newest checkpoint is what a kill leaves of it: all but the manifest, which is written last."""
        path = self.newest.relative_to(self.run)
        absent = self.read(reader, lambda: shutil.rmtree(self.copy / path))
        code, output, errors, story = self.read(reader, (self.copy / path / MANIFEST).unlink)
        same = (code, output, story) == (absent[0], absent[1], absent[3])
        outcome = "counts as absent" if same else f"exit code {code}"
        return Case("half written", "checkpoint", reader, outcome, errors.splitlines()[-1] if errors else "")


# ---- damages --------------------------------------------------------------------------------


def flips(proof: Proof, count: int, draw: random.Random) -> Iterator[Case]:
    """Kinds by turns, of each its readers by turns; every second one flips a bit, the others a byte."""
    files = {
        kind: full
        for kind, paths in proof.kinds().items()
        if (full := [path for path in paths if (proof.run / path).stat().st_size])
    }
    readers = {kind: itertools.cycle(readers_of(kind)) for kind in files}
    for number, kind in zip(range(count), itertools.cycle(files), strict=False):
        path = draw.choice(files[kind])
        place = draw.randrange((proof.run / path).stat().st_size)
        mask = 1 << draw.randrange(8) if number % 2 else draw.randrange(1, 256)
        name = "bit" if mask.bit_count() == 1 else "byte"
        yield proof.case(name, path, next(readers[kind]), lambda copy, p=place, m=mask: flip(copy, p, m))


def flip(path: Path, place: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def others(proof: Proof) -> Iterator[Case]:
    """Each kind of file cut short, emptied, removed; files that do not belong; half-written directories."""
    for kind, paths in proof.kinds().items():
        readers = itertools.cycle(readers_of(kind))
        path = max(paths, key=lambda path: (proof.run / path).stat().st_size)
        if (proof.run / path).stat().st_size:
            yield proof.case("cut short", path, next(readers), cut)
            yield proof.case("emptied", path, next(readers), empty)
        if path.name != MANIFEST:  # without it the directory is half written, see below
            yield proof.case("removed", path, next(readers), Path.unlink)
    step = proof.newest.relative_to(proof.run)
    for folder in (step, step / "state", step / "state" / "d", Path("data")):
        reader = "verify" if folder.name == "data" else "resume"
        yield proof.case("extra file", folder / "extra", reader, Path.touch)
    for reader in ("same command", "generate"):
        yield proof.half_written(reader)
    yield proof.case("half written", Path("data/header.json"), "resume", Path.unlink)


def report(cases: list[Case]) -> None:
    for case in cases:
        print(f"{case.outcome:22} {case.damage:12} {case.kind:45} {case.reader:10} {case.message[:150]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="llm_jax_flips_"))
    harness.prepare_calls(root / "cache")
    proof = Proof(root, args.seed)
    flipped = list(flips(proof, args.flips, random.Random(args.seed)))
    other = list(others(proof))
    shutil.rmtree(root)
    report(flipped + other)
    named = sum(case.outcome == "named" for case in flipped)
    outcomes = Counter(case.outcome for case in other)
    summary = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
    print(f"{named} of {len(flipped)} flips named; other damage: {summary}")
    content = {
        **record.environment("jax", "orbax-checkpoint"),
        "seed": args.seed,
        "flips": len(flipped),
        "named": named,
        "kinds": dict(Counter(case.kind for case in flipped)),
        "readers": dict(Counter(case.reader for case in flipped)),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "passed": named == len(flipped) and {*outcomes} <= GOOD,
        "other_damage_outcomes": dict(outcomes),
        "table": [asdict(case) for case in flipped],
        "other_damage": [asdict(case) for case in other],
    }
    record.write("reliability_flips", content)
    sys.exit(0 if content["passed"] else 1)


if __name__ == "__main__":
    main()
