"""Says what to train for a budget, by a law, and what that costs.

  python scripts/allocate.py --law=chinchilla --compute=1e23
  python scripts/allocate.py --law=law.json --method=surface --compute=1e21 --json=plan.json
  python scripts/allocate.py --law=chinchilla --compute=1e23 --chip=H100 --devices=256 --mfu=0.4 --price=2.5
  python scripts/allocate.py --law=chinchilla --loss=2.0 --inference-tokens=1e13
  python scripts/allocate.py --law=chinchilla --compute=1e23 --unique-tokens=1e11

--law: a published one by name, or a file of scripts/fit_scaling_law.py --json. Chips: V100, A100, H100, H200,
v3, v4, v5e, v5p, v6e, tpu7x; slices by name, of which v3, v4, v5p and tpu7x count cores, two a chip (v4-128:
64 chips); shapes as v5p:4x4x8 and H100:8x2. No price, PUE or grid is assumed. docs/scaling.md explains.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from llm_jax import cli
from llm_jax.scaling import allocate, cost, next_run


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--law", required=True, help="a name, or FILE.json")
    parser.add_argument("--method", default="", help="which of the file's laws")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--compute", type=positive, help="FLOPs to train with")
    budget.add_argument("--loss", type=positive, help="nats a token to train to")
    parser.add_argument("--inference-tokens", type=positive, help="read and written in the model's life")
    parser.add_argument("--unique-tokens", type=positive, help="that there are to train on")
    parser.add_argument("--chip", help="what to train on: adds time, cost and energy")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--devices", type=int, help="how many chips, where the name leaves it open")
    count.add_argument("--days", type=positive, help="the fewest chips for that time")
    parser.add_argument(
        "--mfu", type=positive, default=cost.Rates.mfu, help="model FLOPs utilisation, 0 to 1"
    )
    parser.add_argument("--price", type=positive, help="dollars a chip-hour")
    parser.add_argument("--pue", type=positive, default=cost.Rates.pue, help="of the data centre")
    parser.add_argument("--grid", type=positive, help="g CO2e a kWh")
    parser.add_argument("--watts", type=positive, help="of a chip, as measured")
    parser.add_argument("--json", help="write everything to this file, too")
    args = parser.parse_args()
    if (args.devices or args.days or args.price) and not args.chip:
        parser.error("--devices, --days and --price need --chip")
    source = allocate.load(args.law, args.method)
    flops = args.compute or allocate.cheapest(source.law, args.loss).training
    best = allocate.optimum(source.law, flops, source.resampled)
    found, lines = {"optimum": best}, [source.about, *allocate.optimum_lines(best)]
    if source.resampled is not None and hasattr(source.law, "loss"):
        tried = next_run.candidates(source.law, source.resampled, flops, source.noise)
        lines += allocate.next_lines(tried, flops)
        found["next"] = tried
    if args.inference_tokens:
        found["use"] = allocate.use(source.law, best.loss, args.inference_tokens)
        lines += allocate.use_lines(found["use"])
    if args.unique_tokens:
        found["constrained"] = allocate.constrained(source.law, flops, args.unique_tokens)
        lines += allocate.constrained_lines(found["constrained"])
    if args.chip:
        rates = cost.Rates(args.mfu, args.price, args.pue, args.grid, args.watts)
        devices = args.devices or (args.days and cost.fewest(args.chip, flops, args.days, args.mfu))
        found["cost"] = cost.of(flops, cost.Fleet.parse(args.chip, devices), rates)
        lines += cost.lines(found["cost"])
    print("\n".join(lines))
    if args.json:
        written = {"law": source.about, **found}
        Path(args.json).write_text(json.dumps(written, indent=1, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    cli.main(main)
