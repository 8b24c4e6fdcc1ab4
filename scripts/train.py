"""Trains a language model, or goes on training one: the same command resumes.

  python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python scripts/train.py --config=configs/tiny_clm.py --workdir=runs/mine \\
      --config.data.text=my_text/ --config.optimizer.learning_rate=3e-4

Any key of a config can be set with --config.KEY=VALUE; --print-config shows them all, and which of them
differ from the defaults. Ctrl-C and SIGTERM save and say how to go on; a second one ends at once.
The run directory then holds config.json, metrics/, checkpoints/, samples.txt and report.html.

On several machines start the same command on each, with a --workdir that all of them see. On Cloud TPU, GKE
and under SLURM's srun the processes find one another; elsewhere say where process 0 is:

  python scripts/train.py ... --coordinator=HOST:PORT --processes=4 --process=2
"""

import argparse
import sys

from llm_jax import cli, hosts, storage
from llm_jax import config as configs
from llm_jax.hosts.find import find
from llm_jax.planning.fit import fit
from llm_jax.report import html
from llm_jax.training import experiment, loop, signals
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.samples import SampleFile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file with get_config(), or FILE:ARGUMENT")
    parser.add_argument("--workdir", help="the run's directory: a new one, or one to go on with")
    parser.add_argument("--extend", action="store_true", help="allow more steps than the run began with")
    parser.add_argument("--print-config", action="store_true", help="print every key, mark changes; stop")
    parser.add_argument(
        "--max-seconds", type=float, help="save and stop at the end of the dispatch under way then"
    )
    parser.add_argument("--coordinator", default="", help="HOST:PORT of process 0; PORT + 1 is used, too")
    parser.add_argument("--processes", type=int, default=0, help="how many processes this run has")
    parser.add_argument("--process", type=int, default=-1, help="which of them this is, from 0")
    args, overrides = cli.parse(parser)
    config = experiment.override(cli.load_config(args.config), overrides)
    resolved = experiment.resolve(config)
    if args.print_config:
        changed = configs.changed(experiment.Experiment, resolved)
        for key, value in configs.leaves(resolved):
            print(f"--config.{key}={value}" + (f"  # default: {changed[key][0]}" if key in changed else ""))
        return
    if not args.workdir:
        parser.error("--workdir is required")
    cluster = find(args.coordinator, args.processes, args.process)
    if cluster:
        print(f"process {cluster.index} of {cluster.count} ({cluster.found})", file=sys.stderr)
    with signals.stopping(args.max_seconds) as stop, hosts.connected(cluster):
        result = loop.run(resolved, args.workdir, args.extend, stop=stop, fit=fit)
        if hosts.leads():
            finish(resolved, args.workdir, result)


def finish(resolved: experiment.Experiment, workdir: str, result: dict) -> None:
    """Says how it came out, and writes the report."""
    sections = SampleFile(RunDirectory(storage.path(workdir)).samples).read()
    print(sections[max(sections)])
    if result["loss"] is None:
        print(f"validation loss not finite: the run diverged\nreport: {html.write(workdir)}")
        return
    expected = ""
    if resolved.expected_loss:
        low, high = resolved.expected_loss
        within = "as expected" if low <= result["loss"] <= high else "OUTSIDE what is expected"
        expected = f" ({within}: {low:.2f} to {high:.2f})"
    print(f"validation loss {result['loss']:.4f} nats a token{expected}")
    print(f"report: {html.write(workdir)}")


if __name__ == "__main__":
    cli.main(main)
