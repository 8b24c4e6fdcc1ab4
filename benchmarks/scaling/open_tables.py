"""Laws of three open tables of runs: constants that others have published, and larger runs foretold.

  python -m benchmarks.scaling.open_tables --data=FOLDER

FOLDER holds gemstones_for_fitting_hot.jsonl and _cool_end.jsonl (github.com/mcleish7/gemstone-scaling-laws),
olmo_ladder_final_c4.csv (allenai/OLMo-ladder: size, N, D, c4_ce) and gadre_models.csv (mlfoundations/scaling:
name, dataset, params, params_no_embed, tokens, c4_loss). Each forecast is by the method that the backtest on
the smaller runs chose, and sealed before the larger run's loss is read. Writes results/open_tables.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import record
from llm_jax.scaling import forecast, runs, study
from llm_jax.scaling.laws import surface

GEMSTONES = {"N": "params_active_precise", "D": "tokens", "loss": "final_loss"}
# file, columns, which runs are known, which are foretold, their compute over the largest known one's
LARGER = {
    "OLMo ladder to 7B and 13B": (
        "olmo_ladder_final_c4.csv",
        {"N": "N", "D": "D", "loss": "c4_ce"},
        "N<4e9",
        "N>4e9",
        14.0,
    ),
    "Gadre, C4, under to over 1B": (
        "gadre_models.csv",
        {"N": "params_no_embed", "D": "tokens", "loss": "c4_loss"},
        "dataset=c4_original,params<1e9",
        "dataset=c4_original,params>1e9",
        20.0,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    data = parser.parse_args().data
    found = {"environment": record.environment("numpy", "scipy"), "gemstones": {}, "larger": {}}
    for name in ("hot", "cool_end"):
        law = surface.fit(runs.read(data / f"gemstones_for_fitting_{name}.jsonl", GEMSTONES))
        found["gemstones"][name] = {**vars(law), "a": law.a}
        print(f"gemstones {name}: {found['gemstones'][name]}")
    for name, case in LARGER.items():
        found["larger"][name] = foretold(data, *case)
        print(name, json.dumps(found["larger"][name], indent=1))
    record.write("open_tables", found)


def foretold(data: Path, file: str, columns: dict, known: str, larger: str, horizon: float) -> dict:
    """What the known runs say of the larger ones, and what these were."""
    table = runs.read(data / file, columns)
    targets = table.where(larger)
    with tempfile.TemporaryDirectory() as place:
        law, files = Path(place) / "law.json", []
        law.write_text(json.dumps(study.study(table.where(known), horizon=horizon)))
        for i, (params, tokens) in enumerate(zip(targets.params, targets.tokens, strict=True)):
            files.append(Path(place) / f"forecast{i}.json")
            forecast.write(files[-1], forecast.foretell(law, None, float(params), float(tokens)))
        content = study.read(law)
        chosen = content["chosen"]["runs"]
        scored = [
            forecast.score(forecast.read(f), float(x)) for f, x in zip(files, targets.loss, strict=True)
        ]
    return {
        "known": known,
        "horizon": horizon,
        "chosen": chosen,
        "backtest": {name: entry["backtest"].get("runs") for name, entry in content["methods"].items()},
        "runs": [
            {"params": float(n), "tokens": float(d), **score}
            for n, d, score in zip(targets.params, targets.tokens, scored, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
