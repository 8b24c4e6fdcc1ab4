"""Training steps beside PyTorch's, each side in processes of its own, taking turns.

  pip install -r requirements/benchmarks.txt
  python -m benchmarks.speed.run                       # every row; those of absent hardware at tiny shapes
  python -m benchmarks.speed.run --rows=shakespeare_cpu --rounds=5
  python -m benchmarks.speed.run --rows=124m --peers=transformers

Forward, backward, clipping and AdamW of the same model from memory (and ours from the real loader as well),
after a parity check of losses and gradients from equal weights. Sides: ours; our own PyTorch module of the
same mathematics, on a CPU eager and compiled, on a GPU as benchmarks/speed/tune.py finds it fastest, which is
asked where it has not been on this card with this torch; where they have the shape, transformers as users
meet it, compiled. Rows that fill a GPU run alone. Writes benchmarks/results/speed.json: a row that has not
run on the hardware it names has "dry_run". What fails is said, the other rows go on, and the exit code is 1.
README's table: python -m benchmarks.speed.table
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.speed import tune
from benchmarks.speed.rows import PEERS, ROOT, ROWS, shape
from benchmarks.speed.side import Side, backend
from llm_jax import hardware
from llm_jax.training import experiment
from llm_jax.training.experiment import Experiment

RESULT = ROOT / "benchmarks" / "results" / "speed.json"
TRIAL_STEPS = 4  # of a dry run


def commands(name: str, text: str, tiny: bool, peers: Sequence[str]) -> dict[str, list[str]]:
    """{side: module and arguments}; of a dry run, the peers in one way each."""
    how = [name, text, "tiny" if tiny else "whole", str(TRIAL_STEPS if tiny else 0)]
    sides = {"llm_jax": ["ours", *how]}
    for choice in choices(name, text, tiny) if "torch" in peers else ():
        sides[f"torch {choice['mode']}"] = ["torch_peer", *how, json.dumps(choice)]
    if "transformers" in peers:
        sides["transformers"] = ["transformers_peer", *how, "eager" if tiny else "default"]
    return sides | {"roof of jax": ["roof", "jax"], "roof of torch": ["roof", "torch"]}


def choices(name: str, text: str, tiny: bool) -> list[dict[str, Any]]:
    """In which ways PyTorch is tried."""
    if ROWS[name].platform == "gpu" and not tiny:
        return [tune.best(name, text)]
    return [{"mode": mode} for mode in (("eager",) if tiny else ("eager", "default"))]


def turns(name: str, sides: dict[str, Side], found: dict[str, list]) -> None:
    """Every side measures once."""
    for side, process in sides.items():
        found[side].append(process.ask())
        if "ms" in found[side][-1]:
            last = statistics.median(found[side][-1]["ms"])
            print(f"  {name}, round {len(found[side])}, {side}: {last:.1f} ms a step", flush=True)


def time_sides(
    name: str, text: str, rounds: int, tiny: bool, peers: Sequence[str], cache: str
) -> dict[str, list[dict[str, Any]]]:
    """{side: what it measured in each round}. All sides live through all rounds, each waiting for its turns,
    so that minutes in which the machine is slower are everybody's. First steps, too, are taken one after
    another when all are there: they are measured, and a GPU's compilers time kernels on it."""
    asked, start = commands(name, text, tiny, peers), partial(Side, cache=cache, memory=ROWS[name].memory)
    found: dict[str, list] = {side: [] for side in asked}
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(start(*command)) for side, command in asked.items()}
        for process in sides.values():
            process.answer()
        first = {side: process.ask() for side, process in sides.items()}
        for number in range(rounds):  # there and back, so that a drift within a round favours nobody
            turns(name, dict(reversed(sides.items())) if number % 2 else sides, found)
    return {side: [first[side] | one for one in them] for side, them in found.items()}


def summarize(rounds: list[dict[str, Any]], tokens: int, flops_per_token: float) -> dict[str, Any]:
    """Of the rounds of one side: all their steps together, and each round's median."""
    ms = [x for one in rounds for x in one["ms"]]
    p10, p50, p90 = map(float, np.percentile(ms, (10, 50, 90)))
    out = {
        "ms": round(p50, 2),
        "ms_p10": round(p10, 2),
        "ms_p90": round(p90, 2),
        "round_ms": [round(statistics.median(one["ms"]), 2) for one in rounds],
        "tokens_per_second": round(1000 * tokens / p50),
        "tflops": round(tokens * flops_per_token / p50 / 1e9, 3),
        "first_seconds": round(rounds[0]["first_seconds"], 2),
        "peak_gb": round(max(one["peak_bytes"] for one in rounds) / 1e9, 3),
    }
    if "choice" in rounds[0]:
        out["choice"] = rounds[0]["choice"]
    if "loader_ms" in rounds[0]:
        out["loader_ms"] = round(statistics.median(x for one in rounds for x in one["loader_ms"]), 2)
        out["device"] = f"{rounds[0]['devices']} x {rounds[0]['device']}"
    return out


def utilization(side: dict[str, Any], full: float, causal: float) -> dict[str, float]:
    """MFU by full and by causal attention, of a chip whose peak is known."""
    chip = hardware.lookup(side["device"])
    if chip is None:
        return {}
    mfu = 1e12 * side["tflops"] / chip.flops
    return {"mfu": round(mfu, 3), "mfu_causal": round(mfu * causal / full, 3)}


def check(name: str, text: str, tiny: bool) -> dict[str, Any]:
    """Whether the sides are the same mathematics, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.equal", name, text, "tiny" if tiny else "whole"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the parity check failed:\n{done.stderr[-2000:]}")
    equal = json.loads(done.stdout.splitlines()[-1])
    if not equal["passed"]:
        raise RuntimeError(f"not the same mathematics, nothing is timed: {equal}")
    for how, it in equal["parity"].items():
        within = f"{it['max_gradient_difference']:.1e}, losses within {it['max_loss_difference']:.1e}"
        print(f"{name}: {how}, gradients within {within}", flush=True)
    return equal


def measure(name: str, text: str, rounds: int, tiny: bool, peers: Sequence[str]) -> dict[str, Any]:
    row = ROWS[name]
    equal = check(name, text, tiny)
    # Compilation is measured, so nothing may be compiled before.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        found = time_sides(name, text, rounds, tiny, peers, cache)
    e = experiment.complete(row.experiment(text, tiny), equal["vocab_size"])
    return {"dry_run": tiny, "platform": row.platform, "parity": equal["parity"]} | report(e, found)


def report(e: Experiment, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """found: what each side measured in each round. The roof is a large product's rate, in the framework that
    is faster at it. Of PyTorch's sides the best one is compared; there may be none."""
    rates = {side: [one["tflops"] for one in found[side]] for side in found if side.startswith("roof")}
    roof = max(statistics.median(them) for them in rates.values())
    c, tokens, cost = e.model, e.global_batch_size * e.data.sequence_length, e.flops_per_token()
    out = {side: summarize(them, tokens, cost) for side, them in found.items() if side not in rates}
    for side, it in out.items():
        if side != "transformers":  # it multiplies more: an encoder's head for every token
            it["share_of_roof"] = round(it["tflops"] / roof, 3)
    ours = out["llm_jax"]
    ours |= utilization(ours, cost, e.flops_per_token(c.causal))
    best = min((s for s in out if s.startswith("torch")), key=lambda s: out[s]["ms"], default=None)
    pairs = zip(out[best]["round_ms"], ours["round_ms"], strict=True) if best else ()
    ratios = [theirs / own for theirs, own in pairs]  # of turns in one round: the machine drifts
    return {
        "shape": shape(e),
        "flops_per_token": cost,
        "matmul_tflops": {side: round(statistics.median(them), 3) for side, them in rates.items()},
        "best_torch": best,
        "ours_over_best_torch": round(statistics.median(ratios), 3) if best else None,
        "ratio_of_each_round": [round(ratio, 3) for ratio in ratios],
        "sides": out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="how many turns each side has")
    parser.add_argument("--peers", default=",".join(PEERS), help="who runs beside ours; empty: nobody")
    parser.add_argument("--text", default="python:docs", help="what the tokens are taken from")
    args = parser.parse_args()
    peers = tuple(filter(None, args.peers.split(",")))
    if unknown := {*peers} - {*PEERS}:
        parser.error(f"--peers: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    here = backend()
    names, failed = args.rows.split(","), []
    if unknown := {*names} - {*ROWS}:
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    for name in names:
        tiny = ROWS[name].platform != here
        beside = [peer for peer in ROWS[name].peers if peer in peers]
        try:
            measured = measure(name, args.text, 1 if tiny else args.rounds, tiny, beside)
        except RuntimeError as error:
            print(f"{name}: failed, and its results are as they were: {error}", flush=True)
            failed.append(name)
            continue
        keep(name, measured)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def keep(name: str, measured: dict[str, Any]) -> None:
    """Writes down a row, but no dry run over what the hardware gave."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    dry = measured["dry_run"]
    if best := measured["best_torch"]:
        print(
            f"{name}: {measured['ours_over_best_torch']} times {best}{' (dry run)' if dry else ''}",
            flush=True,
        )
    if dry and not result["rows"].get(name, {"dry_run": True})["dry_run"]:
        print(f"{name}: what the hardware gave stays in the results")
        return
    result["rows"][name] = record.environment("jax", "jaxlib", "torch", "transformers") | measured
    record.write("speed", result)


if __name__ == "__main__":
    main()
