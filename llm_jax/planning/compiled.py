"""The whole training step compiled for a machine that is not there: memory and collectives as they will be.

For TPUs by libtpu (the extra ``tpu``), with no chip; for GPUs by jax's CUDA plugin (``jax[cuda13]``), with no
GPU, and so with no product timed to choose how it is made; for a CPU by as many simulated devices as jax has.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections import Counter
from typing import Any

import jax

from llm_jax import flags
from llm_jax.errors import UserError
from llm_jax.mesh import make_layout
from llm_jax.planning import collectives, gpu_target, layout
from llm_jax.planning.machine import Machine
from llm_jax.planning.plan import Plan
from llm_jax.training import out_of_memory
from llm_jax.training.program import Program

QUIET = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that none can be in use
}


def compile_plan(plan: Plan) -> Plan:
    """The plan with what the compiler says: memory, collectives, seconds, or that it does not fit. Raises
    UserError where this machine cannot compile for that one."""
    flags.add_accelerators(plan.experiment.mesh.overlap_flags, several_gpus=plan.machine.devices > 1)
    devices = find_devices(plan.machine)
    program = Program(plan.experiment, make_layout(plan.experiment.mesh, devices), plan.program.directory)
    state, batch = program.abstract_state(), layout.dispatch(program)
    began = time.monotonic()
    try:
        executable = program.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := out_of_memory.said(str(error))):
            raise
        said = {"out_of_memory": found, "seconds": time.monotonic() - began}
        return dataclasses.replace(plan, compiled=said)
    seconds = time.monotonic() - began
    m = executable.memory_analysis()
    parts = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "aliased": m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "peak": m.peak_memory_in_bytes,
    }
    total = parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
    text = executable.as_text()
    made = collectives.by_kind(collectives.read(text, program.layout.mesh.shape))
    steps = plan.experiment.steps_per_dispatch
    said = {
        "memory": {**parts, "total": total},
        "out_of_memory": None,
        "collectives": {key: sent / steps for key, sent in made.items()},
        "kernels": kernels(text),
        "seconds": seconds,
    }
    return dataclasses.replace(plan, compiled=said)


def kernels(text: str) -> dict[str, int]:
    """{who makes it: calls} in a compiled program, of what XLA leaves to others: cuBLAS's products, cuDNN's
    attention, Pallas kernels."""
    return dict(sorted(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).items()))


def find_devices(machine: Machine) -> list[Any]:
    """Devices to compile for. Raises UserError when there are none and says what is missing."""
    if machine.is_tpu:
        return tpu_devices(machine)
    if machine.chip:
        return gpu_devices(machine)
    if len(jax.devices("cpu")) < machine.devices:
        raise UserError(
            f"jax has {len(jax.devices('cpu'))} CPU devices, {machine.name} needs {machine.devices}"
        )
    return jax.devices("cpu")[: machine.devices]


def tpu_devices(machine: Machine) -> list[Any]:
    """The devices of a topology, from libtpu, which needs no chip."""
    from jax.experimental import topologies

    for name, value in QUIET.items():  # else it asks the network what it runs on
        os.environ.setdefault(name, value)
    several = {"num_slices": machine.slices} if machine.slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=machine.name, **several)
    except (RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--compile for {machine.name} needs libtpu (pip install 'llm_jax[tpu]'): {reason}; without it "
            "the analytic plan still works"
        ) from error
    return list(topology.devices)


def gpu_devices(machine: Machine) -> list[Any]:
    """The devices of nodes of GPUs, from jax's CUDA plugin, which needs none."""
    from jax.experimental import topologies

    gpus, nodes = machine.shape
    known = {"target_config": gpu_target.target(machine), "topology": f"1x{nodes}x{gpus}"}
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of a driver's version: there may be none
    flags.add("gpu", {"xla_gpu_autotune_level": "0"})
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology_name=machine.name, **known)
    except NotImplementedError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--compile for {machine.name} needs jax's plugin for CUDA (pip install 'jax[cuda13]'): "
            f"{reason}; without it the analytic plan still works"
        ) from error
    return list(topology.devices)
