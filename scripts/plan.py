"""Says what a config costs on a machine before a device is booked: memory, network, time, money.

  python scripts/plan.py --config=configs/llama_8b.py --topology=v5p:4x4x8
  python scripts/plan.py --config=configs/llama_8b.py --topology=v5p:4x4x8 --compile
  python scripts/plan.py --config=configs/llama_8b.py --topology=v5e:4x8 --search
  python scripts/plan.py --config=configs/gpt2_124m.py --topology=h100:8x1 --explain

Topologies: v5e, v5p, v6e, tpu7x with the shape of a slice; a GPU as GPUs a node x nodes; cpu:8. Times are
lower bounds: every product, byte of memory and byte of network at its peak, none waiting for another.
--compile compiles the whole step with no chip: for a TPU by libtpu (pip install 'llm_jax[tpu]'), for a Hopper
GPU by jax's plugin (pip install 'jax[cuda13]'). Exit code 3: it does not fit.
"""

import argparse
import json
import sys
from pathlib import Path

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.planning import compiled, plan, search, text
from llm_jax.planning.machine import Machine
from llm_jax.training import experiment

DOES_NOT_FIT = 3
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file with get_config(), or FILE:ARGUMENT")
    parser.add_argument("--topology", required=True, help="v5p:4x4x8, h100:8x2, cpu:8")
    parser.add_argument("--slices", type=int, default=1, help="of TPUs, joined by the slow network")
    parser.add_argument(
        "--explain", action="store_true", help="every parameter and activation: layout, bytes"
    )
    parser.add_argument("--search", action="store_true", help="meshes and micro-batches that fit, ranked")
    parser.add_argument("--compile", action="store_true", help="compile the step and check the estimate")
    parser.add_argument("--tokens", type=float, default=0.0, help="a budget to count days for")
    parser.add_argument("--price", type=float, default=0.0, help="dollars a chip-hour")
    parser.add_argument("--json", help="write everything to this file, too")
    args, overrides = cli.parse(parser)
    config = experiment.override(cli.load_config(args.config), overrides)
    resolved = experiment.resolve(config, find_text=False)
    vocabulary = resolved.model.vocab_size or getattr(resolved.tokenizer, "vocab_size", 0)
    if not vocabulary:
        raise UserError("the vocabulary is known when the text is read: give --config.model.vocab_size=N")
    complete = experiment.complete(resolved, vocabulary)
    machine = Machine.parse(args.topology, args.slices)
    if args.search:
        plans = search.search(complete, machine, SHOWN)
        if not plans:
            print(f"no mesh, micro-batch or recomputation fits {args.topology}")
            sys.exit(DOES_NOT_FIT)
        print("\n".join(text.ranking(plans)))
        complete = plans[0].experiment
    made = plan.make(complete, machine)
    if args.compile:
        made = compiled.compile_plan(made)
    print("\n".join(text.summary(made, args.tokens, args.price)))
    if args.explain:
        print("\n".join(text.explain(made)))
    if args.json:
        Path(args.json).write_text(json.dumps(made.to_json(), indent=1) + "\n")
    sys.exit(0 if made.fits else DOES_NOT_FIT)


if __name__ == "__main__":
    cli.main(main)
