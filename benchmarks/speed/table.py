"""Writes the tables of speeds in the README from benchmarks/results/speed.json.

python -m benchmarks.speed.table
"""

from __future__ import annotations

import json

from benchmarks.speed.rows import ROWS, shape
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


APART = (
    "apart from the steps",
    "ours: first dispatch, s; peak, GB",
    "PyTorch",
    "transformers",
    "ours with the loader, ms",
)


def table(rows: dict[str, dict]) -> str:
    """Two tables, a line a row: what has not run on the hardware it names says so, and so does a row that has
    another shape by now, or ran without a check of its mathematics."""
    measured = {name: row for name, row in rows.items() if not row["dry_run"]}
    return "\n".join(
        [
            *_head(COLUMNS),
            *(_line(name, row) for name, row in rows.items()),
            "",
            *_head(APART),
            *(_apart(name, row) for name, row in measured.items()),
        ]
    )


def _head(columns: tuple[str, ...]) -> list[str]:
    return [_cells(*columns), "|---" * len(columns) + "|"]


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _title(name: str, row: dict) -> str:
    said = [f"`{name}`"]
    if row["shape"] != shape(ROWS[name].experiment("python:docs", tiny=False)):
        said.append("of an earlier shape")
    if not row["parity"]:
        said.append("parity not checked on it")
    return ", ".join(said)


def _apart(name: str, row: dict) -> str:
    def cost(side: str | None) -> str:
        it = row["sides"].get(side)
        return f"{it['first_seconds']:.3g}; {it['peak_gb']:.3g}" if it else ""

    loader = row["sides"]["llm_jax"].get("loader_ms")
    sides = cost("llm_jax"), cost(row["best_torch"]), cost("transformers")
    return _cells(f"`{name}`", *sides, f"{loader:.4g}" if loader else "")


def _line(name: str, row: dict) -> str:
    if row["dry_run"]:
        return f"| `{name}` | not run yet on a {row['platform'].upper()} | | | | | |"
    sides, best = row["sides"], row["best_torch"]
    ours, hugging = sides["llm_jax"], sides.get("transformers")
    span = f"{ours['ms']:.4g} ({ours['ms_p10']:.4g} to {ours['ms_p90']:.4g})"
    theirs, ratio, roof = "not run", "", f"{ours['share_of_roof']:.0%}"
    if best:
        mode = "eager" if best == "torch eager" else "compiled"
        theirs, ratio = (
            f"{sides[best]['ms']:.4g} ({mode})",
            f"{row['ours_over_best_torch']:.2f} times as fast",
        )
        roof += f", PyTorch {sides[best]['share_of_roof']:.0%}"
    elif hugging:
        ratio = f"{hugging['ms'] / ours['ms']:.2f} times as fast as transformers"
    if "mfu" in ours:
        roof += f"; MFU {ours['mfu']:.1%}, causal {ours['mfu_causal']:.1%}"
    return _cells(
        _title(name, row),
        span,
        theirs,
        f"{hugging['ms']:.4g}" if hugging else "",
        ratio,
        roof,
        f"{row['cpu_count']} cores, {row['processor']}" if row["platform"] == "cpu" else ours["device"],
    )


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
