"""Several runs on one self-contained page: what differs in their configs, their curves, their ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm_jax import storage
from llm_jax.report import html, reader, svg
from llm_jax.report.svg import Series


def write(workdirs: Sequence[str | Path], out: Path) -> Path:
    """Writes the comparison of some run directories to ``out`` and gives its path."""
    storage.write_text(out, page([reader.read(workdir) for workdir in workdirs]))
    return out


def page(runs: Sequence[reader.Run]) -> str:
    """The page of at least one run."""
    named = names(runs)
    title = f"llm_jax: {', '.join(named)}"
    return html.document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            "<h2>At the end</h2>",
            table({name: final(run) for name, run in named.items()}),
            f'<h2>Curves</h2><div class="charts">{charts(named)}</div>',
            "<h2>Config</h2><p>What is not the same in all of them.</p>",
            table(differing({name: html.flatten(run.config["config"]) for name, run in named.items()})),
        ],
    )


def names(runs: Sequence[reader.Run]) -> dict[str, reader.Run]:
    """{name: run}: the directory's own name, or the path where two have the same."""
    short = [run.path.name for run in runs]
    return {
        name if short.count(name) == 1 else str(run.path): run for name, run in zip(short, runs, strict=True)
    }


def final(run: reader.Run) -> dict[str, str]:
    """The last numbers of a run, "-" where there are none."""
    steps, trained = run.series("train", "loss")
    _, speeds = run.series("train", "time.tokens_per_second")
    _, judged = run.series("evaluation", "loss")
    step = steps[-1] if steps else 0
    numbers = {
        "steps": f"{step:,}",
        "tokens": f"{step * run.tokens_per_step:,}",
        "training loss, last 20 steps": f"{sum(trained[-20:]) / len(trained[-20:]):.4f}" if trained else "-",
        "validation loss": f"{judged[-1]:.4f}" if judged else "-",
        "best validation loss": f"{min(judged):.4f}" if judged else "-",
    }
    for name in run.sets()[1:]:
        _, losses = run.series("evaluation", "loss", name)
        numbers |= {f"{name} loss": f"{losses[-1]:.4f}"} if losses else {}
    _, accuracies = run.series("evaluation", "accuracy")
    return numbers | {
        "accuracy": f"{accuracies[-1]:.3f}" if accuracies else "-",
        "median tokens/s": f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "-",
    }


def charts(named: Mapping[str, reader.Run]) -> str:
    """Training and validation loss, each over steps and over tokens."""
    drawn = []
    for kind, title in (("train", "training loss"), ("evaluation", "validation loss")):
        lines = {
            name: Series(name, *run.series(kind, "loss"), kind != "train") for name, run in named.items()
        }
        by_tokens = [
            line._replace(x=[step * named[name].tokens_per_step for step in line.x])
            for name, line in lines.items()
        ]
        drawn += [svg.chart(title, list(lines.values())), svg.chart(title, by_tokens, x_label="tokens")]
    return "".join(drawn)


def differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """{run: {key: value}} for the keys that are not equal in all configs."""
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    values = {key: [config.get(key) for config in configs.values()] for key in keys}
    unequal = [key for key in keys if any(value != values[key][0] for value in values[key])]
    return {name: {key: str(config.get(key, "-")) for key in unequal} for name, config in configs.items()}


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A row a key, a column a run."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{escape(column.get(key, '-'))}</td>" for column in columns.values())
        + "</tr>"
        for key in keys
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"
