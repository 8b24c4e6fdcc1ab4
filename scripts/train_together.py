"""Trains several runs that differ in seed and learning rate alone as one program; the same command resumes.

  python scripts/train_together.py --config=a.json --workdir=runs/a --config=b.json --workdir=runs/b

--config, as for scripts/train.py, and the --workdir of its run, as often as there are runs;
--config.KEY=VALUE sets a key in all of them. Each run directory is what scripts/train.py would have made, but
for last bits, which are those of the group: it keeps its members. A run that diverges ends alone.
"""

import argparse

from llm_jax import cli
from llm_jax.report import html
from llm_jax.training import experiment, signals, together_loop


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    many = {"action": "append", "required": True}
    parser.add_argument("--config", **many, help="a file with get_config(), FILE:ARGUMENT or a config.json")
    parser.add_argument("--workdir", **many, help="the directory of its run: a new one, or to go on with")
    parser.add_argument(
        "--max-seconds", type=float, help="save and stop at the end of the dispatch under way then"
    )
    args, overrides = cli.parse(parser)
    if len(args.config) != len(args.workdir):
        parser.error("give --config and --workdir once for every run")
    configs = [experiment.override(cli.load_config(config), overrides) for config in args.config]
    experiments = [experiment.resolve(config) for config in configs]
    with signals.stopping(args.max_seconds) as stop:
        results = together_loop.run(experiments, args.workdir, stop=stop)
    for workdir, result in zip(args.workdir, results, strict=True):
        loss = result["loss"] if result else None
        found = "diverged" if loss is None else f"validation loss {loss:.4f} nats a token"
        print(f"{workdir}: {found}; report: {html.write(workdir)}")


if __name__ == "__main__":
    cli.main(main)
