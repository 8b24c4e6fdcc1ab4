"""Makes the token shards of a config ahead of a run, to be shared by many; or checks some.

  python scripts/prepare_data.py --config=configs/quickstart.py --output=data/python
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/a --config.data.shards=data/python
  python scripts/prepare_data.py --verify=data/python

Any key of the config can be set with --config.KEY=VALUE. Where the shards are already there, only evaluation
sets that they lack are added. --verify reads every byte; exit code 2 when one is not what was written.
"""

import argparse
import sys
from pathlib import Path

from llm_jax import cli, storage
from llm_jax.data import source
from llm_jax.errors import UserError
from llm_jax.text import shards
from llm_jax.text.prepare import prepare
from llm_jax.training import experiment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a file with get_config(), or FILE:ARGUMENT")
    parser.add_argument("--output", help="the directory of the shards")
    parser.add_argument("--verify", metavar="DIR", help="check the shards there; needs no config")
    args, overrides = cli.parse(parser)
    if args.verify:
        verify(storage.path(args.verify))
        return
    if not args.config or not args.output:
        parser.error("--config and --output are required, or --verify")
    config = experiment.override(cli.load_config(args.config), {"data.shards": "", **overrides})
    e = experiment.resolve(config)
    if e.data.shards:
        parser.error("--output says where the shards go; leave --config.data.shards out")
    header = prepare(
        e.data,
        e.tokenizer,
        storage.path(args.output),
        lambda line: print(line, file=sys.stderr),
        e.evaluation.sets,
    )
    report(header)


def verify(directory: Path) -> None:
    """Raises UserError with all that is wrong."""
    found = source.damage(directory)
    if found:
        raise UserError("; ".join(found))
    report(shards.read_header(directory))
    print("every byte is as it was written")


def report(header: dict) -> None:
    """The splits, and what a run's fingerprint has of them."""
    for name, split in header["splits"].items():
        print(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")
    print(f"content {shards.content_id(header)[:16]}")


if __name__ == "__main__":
    cli.main(main)
