"""Reads a run directory: one self-contained HTML page, and the metrics as one story.

  python scripts/report.py --workdir=runs/quickstart
  python scripts/report.py --workdir=runs/quickstart --jsonl=-

--jsonl writes a line a record, of every step the latest attempt's, without wall-clock values.
"""

import argparse
import json
import sys
from pathlib import Path

from llm_jax import cli, storage
from llm_jax.report import html, reader


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run directory")
    parser.add_argument("--jsonl", help="write the story there (- for standard output)")
    args = parser.parse_args()
    run = reader.read(args.workdir)
    if args.jsonl:
        text = "".join(json.dumps(record) + "\n" for record in run.story_without_time())
        sys.stdout.write(text) if args.jsonl == "-" else storage.write_text(Path(args.jsonl), text)
    if args.jsonl != "-":
        print(f"report: {html.write(args.workdir)}")


if __name__ == "__main__":
    cli.main(main)
