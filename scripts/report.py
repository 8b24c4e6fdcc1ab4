"""Reads run directories: one self-contained HTML page of a run or of several, and the metrics as one story.
Of a scaling law, too: of a ladder's directory, or of a law.json alone.

  python scripts/report.py --workdir=runs/quickstart
  python scripts/report.py --workdir=runs/quickstart --jsonl=-
  python scripts/report.py --workdir=runs/a --compare=runs/b,runs/c --out=compared.html
  python scripts/report.py --workdir=runs/ladder
  python scripts/report.py --workdir=law.json --out=law.html

--jsonl writes a line a record, of every step the latest attempt's, without wall-clock values.
"""

import argparse
import json
import sys

from llm_jax import cli, storage
from llm_jax.report import compare, html, law, reader


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run's or a ladder's directory, or a law.json")
    parser.add_argument("--jsonl", help="write the story there (- for standard output)")
    parser.add_argument("--compare", help="other run directories, separated by commas; needs --out")
    parser.add_argument(
        "--out", help="where the page goes; without it, report.html in --workdir, or law.html"
    )
    args = parser.parse_args()
    if args.compare and not args.out:
        parser.error("--compare needs --out=FILE.html")
    place = storage.path(args.workdir)
    if place.suffix == ".json" or (place / "law.json").exists():
        if args.compare or args.jsonl:
            parser.error("--compare and --jsonl are of runs, not of laws")
        write = law.write_law if place.suffix == ".json" else law.write
        print(f"report: {write(place, args.out)}")
        return
    run = reader.read(args.workdir)
    if args.jsonl:
        text = "".join(json.dumps(record) + "\n" for record in run.story_without_time())
        sys.stdout.write(text) if args.jsonl == "-" else storage.write_text(storage.path(args.jsonl), text)
    if args.compare:
        print(f"report: {compare.write([args.workdir, *args.compare.split(',')], storage.path(args.out))}")
    elif args.jsonl != "-":
        print(f"report: {html.write(args.workdir, args.out)}")


if __name__ == "__main__":
    cli.main(main)
