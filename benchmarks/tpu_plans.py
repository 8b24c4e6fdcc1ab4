"""Training steps compiled for TPU pods on a machine that has none, beside what the planner says of them.

  pip install 'llm_jax[tpu]'
  python -m benchmarks.tpu_plans
  python -m benchmarks.tpu_plans --only=8b_v5p

Each is one call of ``scripts/plan.py --compile --json`` in a process of its own: 1 to 5 minutes and 2 to 3 GB
of memory on two cores. Nothing is run on a TPU. Writes benchmarks/results/tpu_plans.json; what is not
compiled anew stays as it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tpu_plans.json"
QWEN_32B = {  # the shape of Qwen2.5 32B
    "model.num_layers": 64,
    "model.num_heads": 40,
    "model.model_dim": 5120,
    "model.mlp_dim": 27_648,
    "tokenizer.vocab_size": 152_064,
}
LLAMA_70B = {"model.num_layers": 80, "model.num_heads": 64, "model.model_dim": 8192, "model.mlp_dim": 28_672}
MIXTRAL = {  # the shape of Mixtral 8x7B
    "model.num_experts": 8,
    "model.experts_per_token": 2,
    "model.capacity_factor": 1.25,
    "tokenizer.vocab_size": 32_000,
}
PIPELINE = {"mesh.stage": 4, "mesh.stage_parts": 16, "mesh.zero": 1}
TINY = {
    "model.num_layers": 2,
    "model.num_heads": 8,
    "model.model_dim": 1024,
    "model.mlp_dim": 4096,
    "data.sequence_length": 1024,
    "tokenizer.vocab_size": 32_000,
}


def width(model_dim: int, num_layers: int) -> dict:
    """A shape of configs/ladder_pod.py, whose heads have 64 features."""
    return {"model.model_dim": model_dim, "model.num_layers": num_layers, "model.num_heads": model_dim // 64}


# {name: (topology, slices, config, changes)}; rows a device follow from global_batch_size
CASES = {
    "8b_v5p": ("v5p:4x4x8", 1, "llama_8b", {"global_batch_size": 128}),
    "8b_v6e": ("v6e:16x16", 1, "llama_8b", {"global_batch_size": 256}),
    "32b_v5p": ("v5p:4x4x8", 1, "llama_8b", QWEN_32B | {"global_batch_size": 128}),
    "1b_v5e": ("v5e:4x4", 1, "llama_1b", {"global_batch_size": 16, "accumulation": 1}),
    "8b_v5p_pipeline": ("v5p:4x4x4", 1, "llama_8b", PIPELINE | {"global_batch_size": 256, "mesh.fsdp": 16}),
    "8b_v5e": ("v5e:4x8", 1, "llama_8b", {"global_batch_size": 32, "mesh.fsdp": 4, "mesh.tensor": 8}),
    "8b_v5e_too_small": ("v5e:4x4", 1, "llama_8b", {"global_batch_size": 64, "mesh.fsdp": 16}),
    "70b_v5p": (
        "v5p:2x2x4",
        1,
        "llama_8b",
        LLAMA_70B | {"global_batch_size": 16, "mesh.fsdp": 8, "mesh.tensor": 2},
    ),
    "8x7b_v5p": (
        "v5p:4x4x4",
        1,
        "llama_8b",
        MIXTRAL | {"global_batch_size": 64, "mesh.recipe": "moe", "mesh.fsdp": 16, "mesh.expert": 4},
    ),
    "1b_v5e_two_slices": (
        "v5e:4x4",
        2,
        "llama_1b",
        {"global_batch_size": 32, "accumulation": 1, "mesh.replica": 2},
    ),
    "ladder_pod_held_out": ("v5p:4x4x8", 1, "ladder_pod", width(2560, 32)),
    "tiny_tpu7x": ("tpu7x:2x2x1", 1, "llama_8b", TINY | {"global_batch_size": 8, "mesh.fsdp": 4}),
}


def compiled(name: str, case: tuple[str, int, str, dict]) -> dict:
    """What scripts/plan.py writes of one case, with its command."""
    topology, slices, config, changes = case
    overrides = [f"--config.{key}={value}" for key, value in {"steps_per_dispatch": 1, **changes}.items()]
    command = ["scripts/plan.py", f"--config=configs/{config}.py", f"--topology={topology}", "--compile"]
    command += [f"--slices={slices}", *overrides]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        made = subprocess.run(
            [sys.executable, *command, f"--json={file}"], cwd=ROOT, capture_output=True, text=True
        )
        if not file.exists():
            sys.exit(f"{name}: {made.stderr[-2000:]}")
        return {"command": " ".join(["python", *command]), **json.loads(file.read_text())}


def row(name: str, found: dict) -> str:
    """One line: estimate against compiler."""
    memory, made = found["memory_per_device_bytes"], found["compiled_memory_bytes"]
    if found["out_of_memory"]:
        there = f"{memory['total'] / 1e9:.1f} of {found['memory_capacity_bytes'] / 1e9:.1f} GB"
        return f"{name:20} {found['out_of_memory']}; the planner: {there}"
    at_rest = memory["parameters"] + memory["optimizer"] + memory["batch"]
    sent = [sum(c[key] for c in found["collectives"]) for key in ("bytes", "minimum_bytes")]
    shares = (
        f"arguments {at_rest / made['arguments']:.3f} of {made['arguments'] / 1e9:.2f} GB",
        f"total {memory['total'] / made['total']:.3f} of {made['total'] / 1e9:.2f} GB",
        f"peak {memory['total'] / made['peak']:.3f} of {made['peak'] / 1e9:.2f} GB",
        f"network {sent[0] / max(sent[1], 1):.3f} of the least {sent[1] / 1e9:.1f} GB",
        f"MFU at most {found.get('mfu_bound', 0):.1%}",
    )
    return f"{name:20} {found['compile_seconds']:5.0f} s  {', '.join(shares)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, help="one of them")
    args = parser.parse_args()
    results = json.loads(RESULT.read_text())["results"] if RESULT.exists() else {}
    for name in [args.only] if args.only else CASES:
        results[name] = compiled(name, CASES[name])
        print(row(name, results[name]), flush=True)
        record.write("tpu_plans", record.environment("jax", "libtpu") | {"results": results})


if __name__ == "__main__":
    main()
