"""A run as one self-contained HTML page: no script, no file beside it, nothing fetched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm_jax import config as configs
from llm_jax import storage
from llm_jax.report import goodput, reader, svg
from llm_jax.report.svg import Series
from llm_jax.training.experiment import Experiment
from llm_jax.training.rundir import RunDirectory

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#0f172a;max-width:1360px;margin:2rem auto;padding:0 1.5rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}.sub{color:#64748b;margin:0 0 1rem}
.cards{display:flex;flex-wrap:wrap;gap:.75rem}.card{background:#f1f5f9;border-radius:8px;padding:.6rem 1rem}
.card b{display:block;font-size:1.3rem}.card span{color:#64748b;font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:1rem}
svg{width:100%;border:1px solid #e2e8f0;border-radius:8px;background:#fff}
svg text{font-size:11px;fill:#475569}svg text.title{font-size:13px;font-weight:600;fill:#0f172a}
svg .grid{stroke:#e2e8f0}svg polyline{fill:none;stroke-width:1.6}
pre{background:#f8fafc;border:1px solid #e2e8f0;border-radius:8px;padding:1rem;white-space:pre-wrap}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.15rem 1rem .15rem 0;vertical-align:top}
td:first-child{color:#64748b}th{text-align:left}
.bar{display:flex;height:18px;border-radius:6px;overflow:hidden;margin-bottom:.5rem}.bar i{display:block}
"""


def write(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page to ``out`` (default: report.html in the run directory) and gives its path."""
    path = storage.path(out) if out else RunDirectory(storage.path(workdir)).report
    storage.write_text(path, page(reader.read(workdir)))
    return path


def page(run: reader.Run) -> str:
    """The page of one run."""
    title = f"llm_jax run {run.path.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">fingerprint {run.config["fingerprint"]}, data {run.config["data"][:16]}</p>',
        f'<div class="cards">{cards(run)}</div>',
        f'<h2>Curves</h2><div class="charts">{charts(run)}</div>',
        f"<h2>Where the time went</h2>{times(run.path)}",
        f"<h2>Samples</h2><pre>{escape(run.samples) or 'none yet'}</pre>",
        "<h2>Config</h2><p>What differs from the defaults; config.json has all of it.</p>",
        table(changed(run.config["config"])),
        f"<h2>Environment</h2>{table(flatten(run.environment))}",
    ]
    return document(title, sections)


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page around its sections."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def cards(run: reader.Run) -> str:
    """The numbers to see first."""
    _, losses = run.series("evaluation", "loss")
    _, accuracies = run.series("evaluation", "accuracy")
    _, speeds = run.series("train", "time.tokens_per_second")
    steps, _ = run.series("train", "loss")
    numbers = {
        "validation loss": f"{losses[-1]:.4f}" if losses else "-",
        "best validation loss": f"{min(losses):.4f}" if losses else "-",
        "accuracy": f"{accuracies[-1]:.3f}" if accuracies else "-",
        "steps": f"{steps[-1]:,} of {run.config['config']['steps']:,}" if steps else "-",
        "median tokens/s": f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "-",
    } | resources(run)
    return "".join(
        f'<div class="card"><b>{value}</b><span>{escape(name)}</span></div>'
        for name, value in numbers.items()
    )


def resources(run: reader.Run) -> dict[str, str]:
    """Memory at its peak, of the fullest device or of the process, and the share of time that the loop
    waited for batches."""
    numbers = {}
    for name, shown in (("device_bytes_peak", "device memory, peak"), ("process_bytes_peak", "memory, peak")):
        _, peaks = run.series("train", f"time.{name}")
        numbers |= {shown: f"{max(peaks) / 2**30:.2f} GiB"} if peaks else {}
    waits = dict(zip(*run.series("train", "time.data_wait"), strict=True))
    seconds = dict(zip(*run.series("train", "time.seconds"), strict=True))
    waited = sum(waits.get(step, 0.0) for step in seconds)
    return numbers | ({"waited for data": f"{waited / sum(seconds.values()):.1%}"} if seconds else {})


def times(path: Path) -> str:
    """Seconds and shares of a run's wall time, as a bar and a table."""
    spent = {k: s for k, s in goodput.goodput(RunDirectory(path).metrics).items() if s > 0}
    whole = sum(spent.values())
    if not whole:
        return "<p>not measured</p>"
    shares = zip(spent.items(), itertools.cycle(svg.COLOURS), strict=False)
    bar = "".join(
        f'<i style="width:{seconds / whole:.2%};background:{colour}" title="{kind}"></i>'
        for (kind, seconds), colour in shares
    )
    rows = {kind: f"{seconds:,.1f} s, {seconds / whole:.1%}" for kind, seconds in spent.items()}
    return f'<div class="bar">{bar}</div>{table(rows)}'


def layer_lines(run: reader.Run, name: str, most: int = 5) -> list[Series]:
    """Norms over the layers, one line for each of a few evaluations from the first to the last."""
    found = run.block_norms(name)
    steps = list(found)
    chosen = {steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)} if steps else set()
    return [Series(f"step {s:,}", range(len(found[s])), found[s], marked=True) for s in sorted(chosen)]


def charts(run: reader.Run) -> str:
    """Losses, speed, norms and the learning rate over steps."""

    def one(kind: str, name: str, shown: str, marked: bool = False) -> Series:
        return Series(shown, *run.series(kind, name), marked)

    judged = [Series(name, *run.series("evaluation", "loss", name), marked=True) for name in run.sets()]
    drawn = [
        svg.chart("loss, nats a token", [one("train", "loss", "training"), *judged]),
        svg.chart("generalisation gap, nats a token", [Series("validation - training", *run.gap(), True)]),
        svg.chart("accuracy on validation", [one("evaluation", "accuracy", "accuracy", marked=True)]),
        svg.chart("tokens a second", [one("train", "time.tokens_per_second", "tokens/s")]),
        svg.chart("learning rate", [one("train", "learning_rate", "rate")]),
        svg.chart("gradient norm before clipping", [one("train", "grad_norm", "gradients")]),
        svg.chart("parameter norm", [one("train", "param_norm", "parameters")]),
        svg.chart("gradient norm by layer", layer_lines(run, "grad_norms"), x_label="layer"),
        svg.chart("parameter norm by layer", layer_lines(run, "param_norms"), x_label="layer"),
        svg.chart("update norm", [one("train", "update_norm", "updates")]),
        svg.chart(
            "model FLOPs utilisation",
            [one("train", "time.mfu", "full"), one("train", "time.mfu_causal", "causal")],
        ),
    ]
    return "".join(drawn)


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a stored config that differ from the defaults."""
    default = flatten(configs.to_dict(Experiment()))
    return {key: value for key, value in flatten(config).items() if default.get(key) != value}


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: value}; tuples as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            flat |= flatten(value, where)
        else:
            flat[where] = list(value) if isinstance(value, tuple) else value
    return flat


def table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"
