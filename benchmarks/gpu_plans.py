"""Training steps compiled for NVIDIA GPUs on a machine that has none, beside what the planner says of them.

  pip install 'jax[cuda13]'
  python -m benchmarks.gpu_plans

Each is one call of ``scripts/plan.py --compile --json`` in a process of its own, under a minute on two cores.
Nothing is run on a GPU, and no product is timed to choose how it is made. Writes
benchmarks/results/gpu_plans.json.
"""

from __future__ import annotations

import argparse

from benchmarks import record
from benchmarks.tpu_plans import compiled, row

WHOLE = {"data.rows": "contiguous", "model.scan_layers": False, "accumulation": 1}
CASES = {
    "124m_h200": ("h200:1", 1, "gpt2_124m", WHOLE | {"global_batch_size": 64}),
    "124m_packed_h200": (
        "h200:1",
        1,
        "gpt2_124m",
        WHOLE | {"data.rows": "packed", "model.scan_layers": True, "global_batch_size": 32},
    ),
    "bert_base_h200": ("h200:1", 1, "bert_base", WHOLE | {"global_batch_size": 128}),
    "1b_h200": ("h200:1", 1, "llama_1b", WHOLE | {"global_batch_size": 8, "mesh.fsdp": 1}),
    "8b_h100": ("h100:8", 1, "llama_8b", {"global_batch_size": 8, "mesh.fsdp": 8, "accumulation": 1}),
}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    results = {}
    for name, case in CASES.items():
        results[name] = compiled(name, case)
        print(row(name, results[name]), flush=True)
        environment = record.environment("jax", "jax-cuda13-plugin")
        record.write("gpu_plans", environment | {"results": results})


if __name__ == "__main__":
    main()
