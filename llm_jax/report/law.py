"""A scaling law as one self-contained HTML page, with the ladder that it comes from where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.report import html, law_charts, law_reader
from llm_jax.report.law_reader import Findings
from llm_jax.report.svg import short
from llm_jax.scaling import backtest
from llm_jax.scaling.laws.isoflop import Frontier
from llm_jax.scaling.laws.power import Kaplan
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.shown import QUESTIONS
from llm_jax.scaling.study import AHEAD

FORMS = {
    Surface: "L = E + A/N^alpha + B/D^beta, of runs that cost flops_per N D",
    Frontier: "L* = E + K C^-gamma, N* = G C^a, D* = H C^b",
    Kaplan: "L = [(Nc/N)^(alpha_N/alpha_D) + Dc/D]^alpha_D, of runs that cost flops_per N D",
}
FIRST, MOST_ROWS = ("of", "index", "loss", "training_flops"), 500  # of the run table


def write(directory: str | Path, out: str | Path | None = None) -> Path:
    """The page of a ladder, to ``out`` (default: report.html in its directory), whose path it gives. Raises
    UserError for a directory without law.json."""
    directory = storage.path(directory)
    path = storage.path(out) if out else directory / "report.html"
    storage.write_text(path, page(law_reader.read(directory)))
    return path


def write_law(law_json: str | Path, out: str | Path | None = None) -> Path:
    """The page of a law.json alone, to ``out`` (default: beside it, .html for .json), whose path it gives.
    Raises UserError for another file."""
    law_json = storage.path(law_json)
    path = storage.path(out) if out else law_json.with_suffix(".html")
    storage.write_text(path, page(law_reader.read_law(law_json)))
    return path


def page(found: Findings) -> str:
    title = f"llm_jax {'ladder' if found.ladder else 'scaling law'} {found.name}"
    sections = [
        f'<h1>{escape(title)}</h1><p class="sub">{escape(origin(found))}</p>',
        f'<p>{escape(verdict(found))}</p><div class="cards">{cards(found)}</div>',
        f'<h2>Curves</h2><div class="charts">{law_charts.charts(found)}</div>',
        f"<h2>Forecast and score</h2>{foretold(found)}" if found.ladder else "",
        f"<h2>Methods</h2>{methods(found)}",
        f"<h2>Constants</h2><p>95% intervals are of resampled fits.</p>{constants(found)}",
        f"<h2>Backtest</h2>{tested(found)}",
        f"<h2>IsoFLOP minima</h2>{minima(found)}" if found.budgets else "",
        f"<h2>Sensitivity</h2>{sensitivity(found)}",
        f"<h2>Runs</h2>{runs(found.rows)}",
    ]
    return html.document(title, sections)


def origin(found: Findings) -> str:
    table = found.content["table"]
    columns = ", ".join(f"{name} = {column}" for name, column in table["columns"].items())
    return (
        f"{table['runs']} runs up to {short(found.content['largest'])} FLOPs, of {table['file']} (kept: "
        f"{table['kept']}; {columns or 'its own columns'}; sha256 {table['sha256'][:16]})"
    )


def verdict(found: Findings) -> str:
    """What is chosen and why: a sentence a question."""
    content, said = found.content, []
    for kind in (backtest.FRONTIER, backtest.RUNS):
        scores = {n: e["backtest"][kind] for n, e in content["methods"].items() if kind in e["backtest"]}
        first, *others = sorted(scores, key=scores.__getitem__) or [None]
        others = [name for name in others if scores[name] > scores[first]]  # not the same twice
        question = QUESTIONS[kind][0].upper() + QUESTIONS[kind][1:]
        if first:
            against = f"; {others[0]}, the next, by {scores[others[0]]:.2%}" if others else ""
            said.append(
                f"{question} the backtest chose {first}: foretelling up to {content['horizon']:.3g}x the "
                f"compute it had been fitted to, it missed by {scores[first]:.2%} on average{against}."
            )
        else:
            drawn = found.method(kind)
            shown = f"{drawn} is shown without a judgement" if drawn else "no method says anything of it"
            said.append(f"{question} the backtest had no trial: {shown}.")
    return " ".join(said)


def cards(found: Findings) -> str:
    """The numbers to see first."""
    name = found.method(backtest.FRONTIER)
    entry = found.content["methods"][name]
    low, high = entry.get("intervals", {}).get("a", (None, None))
    numbers = {f"a of N* ~ C^a, by {name}": f"{entry['a']:.4f}"}
    if low is not None:
        numbers["its 95% interval"] = f"{low:.4f} to {high:.4f}" if low < high else "fixed by its form"
    if found.budgets:
        inside = sum(budget.interior for budget in found.budgets)
        numbers["budgets with their minimum inside"] = f"{inside} of {len(found.budgets)}"
    if made := found.forecast:
        numbers[f"forecast at {short(made.flops)} FLOPs"] = f"{made.loss:.4f}"
        numbers[f"its {made.level:.0%} interval"] = f"{made.low:.4f} to {made.high:.4f}"
    if scored := found.score:
        numbers["seen"] = f"{scored['seen']:.4f}"
        numbers["error, " + ("inside" if scored["inside"] else "OUTSIDE")] = f"{scored['error']:+.2%}"
    return "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for what, value in numbers.items()
    )


def foretold(found: Findings) -> str:
    if not (made := found.forecast):
        return "<p>No forecast has been made yet.</p>"
    same = (
        "as it is now" if made.law == found.sha256 else "NOT as it is now: it was changed after the forecast"
    )
    rows = {
        "made": made.made,
        "law.json": f"sha256 {made.law[:16]}, {same}",
        "method": made.method,
        "run": f"{made.flops:.6g} FLOPs, N = {made.params:.6g}, D = {made.tokens:.6g}",
        "foretold, nats a token": f"{made.loss:.6f}",
        f"{made.level:.0%} interval": f"{made.low:.6f} to {made.high:.6f}",
    }
    if not (scored := found.score):
        return html.table(rows) + "<p>The held-out run is still to come.</p>"
    rows |= {"seen": f"{scored['seen']:.6f}", "error, foretold over seen": f"{scored['error']:+.3%}"}
    return html.table(rows | {"inside the interval": "yes" if scored["inside"] else "NO"})


def methods(found: Findings) -> str:
    """A row a method; what could not be fitted, and why."""
    content, rows = found.content, []
    for name, entry in content["methods"].items():
        scores = [f"{entry['backtest'][k]:.3%}" if k in entry["backtest"] else "-" for k in QUESTIONS]
        asked = ", ".join(kind for kind, chosen in content["chosen"].items() if chosen == name)
        objective = digits(entry["objective"]) if "objective" in entry else "-"
        fit = str(entry["runs"]), digits(entry["a"]), f"{entry['residual']:.3%}", objective
        rows.append((name, entry["about"], *fit, *scores, asked))
    scored = (f"backtest, {kind}" for kind in QUESTIONS)
    head = ("method", "what it is", "runs", "a", "residual", "objective", *scored, "chosen for")
    failed = html.table({name: f"not fitted: {reason}" for name, reason in content["failed"].items()})
    return table(head, rows) + (failed if content["failed"] else "")


def constants(found: Findings) -> str:
    """A table for each form of law, a method in one row and its interval in two more."""
    parts = []
    for kind, form in FORMS.items():
        entries = {n: found.content["methods"][n] for n, (law, _) in found.laws.items() if type(law) is kind}
        names = list(dict.fromkeys([*(f.name for f in fields(kind)), "a"]))
        rows = []
        for method, entry in entries.items():
            rows.append((method, *(digits(entry[name]) if name in entry else "-" for name in names)))
            for i, end in enumerate(("95% from", "95% to") if "intervals" in entry else ()):
                ends = (entry["intervals"].get(name) for name in names)
                rows.append((end, *(digits(both[i]) if both else "" for both in ends)))
        if rows:
            parts.append(f"<p>{escape(form)}</p>{table(('', *names), rows)}")
    return "".join(parts)


def tested(found: Findings) -> str:
    """The trials of each method and question in numbers."""
    rows = []
    for kind in QUESTIONS:
        for name, entry in found.content["methods"].items():
            own = [t for t in found.content["backtest"] if (t["method"], t["kind"]) == (name, kind)]
            if not own:
                continue
            errors = np.array([t["error"] for t in own])
            score = f"{entry['backtest'][kind]:.3%}" if kind in entry["backtest"] else "-"
            spread = f"{errors.mean():+.3%}", f"{errors[np.abs(errors).argmax()]:+.3%}"
            rows.append((kind, name, str(len({t["origin"] for t in own})), str(len(own)), score, *spread))
    if not rows:
        return "<p>None was possible: too few runs, or of one budget; a forecast from them is a guess.</p>"
    asked = "".join(f"<li>{kind}: {escape(question)}</li>" for kind, question in QUESTIONS.items())
    head = ("question", "method", "origins", "trials", "mean |error|", "mean error", "worst error")
    return (
        f"<ul>{asked}</ul>{table(head, rows)}"
        "<p>Mean |error| is what chooses: over the origins that all methods have, by how many runs were "
        "fitted at each.</p>"
    )


def minima(found: Findings) -> str:
    rows = [
        (
            digits(b.flops),
            *(
                (digits(b.params), digits(b.tokens), f"{b.tokens / b.params:.4g}")
                if b.interior
                else ["-"] * 3
            ),
            digits(b.loss) if b.interior else "-",
            "yes" if b.interior else "NO",
            str(b.points),
            f"{b.width:.3g}x",
        )
        for b in found.budgets
    ]
    return table(("C, FLOPs", "N*", "D*", "D*/N*", "loss", "interior", "sizes", "from first to last"), rows)


def sensitivity(found: Findings) -> str:
    """Constants and forecast of the surface, and how far that moves the forecast."""
    rows = found.content["sensitivity"]
    if not rows:
        return "<p>No surface was fitted.</p>"
    names = ("E", "A", "B", "alpha", "beta", "a", "ahead")
    cells = [
        (row["what"], *(digits(row[n]) for n in names), f"{row['ahead'] / rows[0]['ahead'] - 1:+.2%}")
        for row in rows
    ]
    head = ("surface, if", *names[:-1], f"best loss at {AHEAD:g}x the largest budget", "against the first")
    return table(head, cells)


def runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """The run table: what is the same in all rows as a list, the rest in columns."""
    flat = [html.flatten(row) for row in rows]
    known = dict.fromkeys(name for row in flat for name in row)
    names = list(dict.fromkeys([*(name for name in FIRST if name in known), *known]))
    values = {name: {str(row.get(name)) for row in flat} for name in names}
    same = {name: flat[0][name] for name in names if len(flat) > 1 and len(values[name]) == 1}
    differ = [name for name in names if name not in same]
    said = ", ".join(f"{name} = {cell(value)}" for name, value in same.items() if value is not None)
    shown = table(differ, [[cell(row.get(name)) for name in differ] for row in flat[:MOST_ROWS]])
    left = f"<p>{len(flat) - MOST_ROWS} more are not shown.</p>" if len(flat) > MOST_ROWS else ""
    return (f"<p>In all of them: {escape(said)}</p>" if said else "") + shown + left


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With a line of names, as wide as it needs to be."""
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows]
    return f'<div style="overflow-x:auto"><table style="white-space:nowrap">{"".join(lines)}</table></div>'


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def digits(value: float) -> str:
    """Seven significant ones: a law with rounded constants is another law."""
    return f"{value:#.7g}".rstrip(".")
