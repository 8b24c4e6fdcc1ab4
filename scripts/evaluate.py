"""How good a trained model is: loss, perplexity, bits per byte and accuracy, on any text or a named set.

  python scripts/evaluate.py --workdir=runs/quickstart
  python scripts/evaluate.py --workdir=runs/quickstart --text=novel.txt --json
  python scripts/evaluate.py --workdir=runs/mixture --set=validation.code

Without --text and --set: the validation set, its sources, and every set of the config. bits_per_byte is a
decoder's; an encoder's numbers are of masked tokens, always the same ones. The newest checkpoint is used.
"""

import argparse
import json

from llm_jax import cli
from llm_jax.training.program import Program


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run directory with a checkpoint")
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], help="files, directories or globs of text"
    )
    parser.add_argument("--set", help='"validation", "validation.SOURCE" or "test.NAME"')
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    program, state = Program.restore(args.workdir)
    params = state.judged
    if args.text:
        results = {"text": program.evaluate_text(params, tuple(args.text))}
    elif args.set:
        results = {args.set: program.evaluate_set(params, args.set)}
    else:
        results = program.evaluate_all(params)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for name, values in results.items():
        shown = (f"{key} {value:,.4f}".removesuffix(".0000") for key, value in values.items())
        print(f"{name}: {', '.join(shown)}")


if __name__ == "__main__":
    cli.main(main)
