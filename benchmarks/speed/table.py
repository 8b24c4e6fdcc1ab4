"""Writes the table of speeds in the README from benchmarks/results/speed.json.

python -m benchmarks.speed.table
"""

from __future__ import annotations

import json

from benchmarks.speed.run import RESULT, ROOT

BEGIN, END = "<!-- speed: made by benchmarks/speed/table.py -->", "<!-- end of speed -->"
COLUMNS = (
    "step",
    "ours, ms (p10 to p90)",
    "PyTorch at its best, ms",
    "transformers, ms",
    "ours is",
    "of the roof",
    "on",
)


def table(rows: dict[str, dict]) -> str:
    """A line a row; what has not run on the hardware it names says so."""
    return "\n".join(
        [
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *(_line(name, row) for name, row in rows.items()),
        ]
    )


def _line(name: str, row: dict) -> str:
    if row["dry_run"]:
        return f"| `{name}` | not run yet on a {row['platform'].upper()} | | | | | |"
    sides, best = row["sides"], row["best_torch"]
    ours, torch = sides["llm_jax"], sides[best]
    span = f"{ours['ms']:.4g} ({ours['ms_p10']:.4g} to {ours['ms_p90']:.4g})"
    mode = best.removeprefix("torch ")
    theirs = f"{torch['ms']:.4g} ({'eager' if mode == 'eager' else 'compiled'})"
    roof = f"{sides['llm_jax']['share_of_roof']:.0%}, PyTorch {sides[best]['share_of_roof']:.0%}"
    cells = (
        f"`{name}`",
        span,
        theirs,
        f"{sides['transformers']['ms']:.4g}" if "transformers" in sides else "",
    )
    cells += (f"{row['ours_over_best_torch']:.2f} times as fast", roof, ours["device"])
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    content = table(json.loads(RESULT.read_text())["rows"])
    readme.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}")
    print(content)


if __name__ == "__main__":
    main()
