"""Lets a trained model write: a decoder continues a prompt, an encoder fills its blanks.

  python scripts/generate.py --workdir=runs/quickstart --prompt='def main(' --top-k=40
  python scripts/generate.py --workdir=runs/bert_char --prompt='To be or n<mask>t to be'

--temperature=0 is greedy. The newest checkpoint of the run is used.
"""

import argparse

from llm_jax import cli
from llm_jax.inference.sampling import Sampling
from llm_jax.training import samples
from llm_jax.training.experiment import SampleConfig
from llm_jax.training.program import Program


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run directory with a checkpoint")
    parser.add_argument("--prompt", default="", help="text to go on from, or with <mask> where to fill in")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write (decoder)")
    parser.add_argument("--count", type=int, default=1, help="how many samples (decoder)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k best tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the best that sum to p")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--best", type=int, default=3, help="guesses shown for each blank (encoder)")
    args = parser.parse_args()
    program, state = Program.restore(args.workdir)
    if program.experiment.model.causal:
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        config = SampleConfig(args.prompt, args.count, args.tokens)
        print(samples.continuations(program, state.judged, config, sampling, args.seed), end="")
    else:
        print(samples.filled(program, state.judged, args.prompt, args.best), end="")


if __name__ == "__main__":
    cli.main(main)
