"""What a run that goes on keeps of its first start."""

import dataclasses

import pytest

from llm_jax.training import experiment
from llm_jax.training.rundir import carry_on


def chosen(cpu_devices, dtype):
    config = experiment.override(
        experiment.default_config(), {"mesh.cpu_devices": cpu_devices, "model.dtype": dtype}
    )
    return experiment.resolve(config)


@pytest.mark.parametrize("said", [(0, "auto"), (4, "float32")])
def test_devices_and_dtype_of_the_first_start_are_kept_unless_said(said):
    """Another count of devices would give other bits, another dtype other numbers."""
    old = chosen(2, "bfloat16")
    kept = carry_on(old, dataclasses.replace(chosen(*said), steps=old.steps), extend=False)
    here = kept.mesh.cpu_devices, kept.model.dtype
    assert here == ((2, "bfloat16") if said == (0, "auto") else said)
