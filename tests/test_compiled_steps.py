"""A guard of speed that is no timed test: what the compiler makes of the main training steps is what it was.

FLOPs, bytes accessed, the numbers of fusions and of collectives are compared with tests/golden/compiled.json,
by version of jax. After a wanted change, this writes them anew: python tests/test_compiled_steps.py
"""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest
import simulated  # eight devices, also where this is run as a script

from llm_jax.mesh import make_layout
from llm_jax.planning.layout import dispatch
from llm_jax.training import experiment
from llm_jax.training.presets import MODERN
from llm_jax.training.program import Program

GOLDEN = Path(__file__).parent / "golden" / "compiled.json"
VERSION = ".".join(jax.__version__.split(".")[:2])
SMALL = {
    "global_batch_size": 16,
    "data.text": ("python:docs",),
    "data.sequence_length": 64,
    "model.vocab_size": 128,
    "model.num_layers": 2,
    "model.model_dim": 64,
    "model.dtype": "float32",
}
GPT2 = {"model.positions": "learnt", "model.norm": "layernorm", "model.activation": "gelu"}
ENCODER = GPT2 | {"model.causal": False, "objective.name": "mlm"}
STEPS = {
    "decoder": {"model.scan_layers": False},
    "gpt2": GPT2 | {"model.scan_layers": False},
    "modern": MODERN,
    "encoder": ENCODER,
    "accumulated, recomputed": {"accumulation": 2, "model.remat": True},
    "data 8": {"mesh.data": 8},
    "fsdp 8": {"mesh.fsdp": 8},
    "fsdp 4, tensor 2": {"mesh.fsdp": 4, "mesh.tensor": 2},
}
FAST = ("decoder",)
NEAR = 0.02  # relative; FLOPs are equal
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def compiled(changes):
    """The step of SMALL with these changes, for CPU devices."""
    e = experiment.resolve(experiment.override(experiment.default_config(), SMALL | changes))
    e = experiment.complete(e, 128)
    count = math.prod(max(size, 1) for size in e.mesh.sizes.values())
    program = Program(e, make_layout(e.mesh, jax.devices()[:count]), Path("unused"))
    lowered = program.lower(program.abstract_state(), dispatch(program))
    same = {"xla_cpu_max_isa": "AVX2"}  # on newer processors
    return lowered.compile(compiler_options=same | simulated.AS_IN_A_RUN)


def figures(changes):
    step = compiled(changes)
    cost, text = step.cost_analysis(), step.as_text()
    called = Counter(re.findall(r" (fusion|" + "|".join(COLLECTIVES) + r")\(", text))
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"], **dict(sorted(called.items()))}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]
)
def test_a_step_is_compiled_to_what_it_was(name):
    stored = json.loads(GOLDEN.read_text()).get(VERSION)
    assert stored, f"nothing is stored for jax {VERSION}; write it: python tests/test_compiled_steps.py"
    found, before = figures(STEPS[name]), stored[name]
    assert found.keys() == before.keys()
    assert found["flops"] == pytest.approx(before["flops"], rel=1e-3)
    for key in before.keys() - {"flops", *COLLECTIVES}:
        assert found[key] == pytest.approx(before[key], rel=NEAR), key
    for key in before.keys() & {*COLLECTIVES}:
        assert found[key] <= before[key], key


@pytest.mark.slow
def test_depth_adds_no_program():
    """Scanned layers are one body, whatever their number: 64 as 8."""
    few, many = (compiled({"model.num_layers": n}).as_text().count(" fusion(") for n in (8, 64))
    assert many <= few


def test_starting_imports_nothing_that_only_training_needs():
    """grain and orbax are 0.3 s, Pallas 0.1 s; nothing needs torch."""
    heavy = ["grain", "orbax.checkpoint", "tensorstore", "jax.experimental.pallas", "torch", "tensorflow"]
    code = "import llm_jax.training.loop, llm_jax.planning.fit, sys; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known[VERSION] = {name: figures(changes) for name, changes in STEPS.items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
