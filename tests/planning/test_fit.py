"""The micro-batch is chosen by the free memory, and kept; what is too little memory is said in one line."""

import dataclasses

import families
import jax
import pytest

from llm_jax.errors import UserError
from llm_jax.planning import fit, layout, memory, residuals
from llm_jax.planning.machine import Machine
from llm_jax.training import experiment, out_of_memory
from llm_jax.training.rundir import carry_on

CHANGES = {
    "global_batch_size": 16,
    "accumulation": 0,
    "data.text": ("python:docs",),
    "data.sequence_length": 64,
    "model.vocab_size": 100,
    "model.num_layers": 4,
    "mesh.data": 2,
}


@pytest.fixture(scope="module")
def program():
    e = experiment.resolve(experiment.override(experiment.default_config(), CHANGES))
    return layout.prepare(experiment.complete(e, 100), Machine("cpu", 2, 1, (2,), None))


def total(program, accumulation, remat=False):
    e = program.experiment
    model = dataclasses.replace(e.model, remat=remat)
    changed = dataclasses.replace(
        program, experiment=dataclasses.replace(e, accumulation=accumulation, model=model)
    )
    return memory.estimate(changed, layout.state(program))["total"]


def chosen(program, free, monkeypatch, filling=1, fillable=None):
    monkeypatch.setattr(fit, "free_memory", lambda kept=False: fillable if kept and fillable else free)
    monkeypatch.setattr(fit, "FEWEST_TOKENS", filling)
    said = []
    e = fit.fit(program, said.append).experiment
    return e.accumulation, e.model.remat, said


@pytest.mark.slow
def test_as_few_micro_batches_as_fit(program, monkeypatch):
    for accumulation in (1, 2, 8):
        free = total(program, accumulation) + 1
        assert chosen(program, free, monkeypatch)[:2] == (accumulation, False)


@pytest.mark.slow
def test_blocks_are_recomputed_before_micro_batches_get_too_small(program, monkeypatch):
    free = total(program, 2) + 1
    assert chosen(program, free, monkeypatch, filling=8 * 64)[:2] == (1, True)
    assert total(program, 1, remat=True) <= free


def test_a_gpu_keeps_less_of_unrolled_layers_than_jax_says(program):
    """By what is compiled for one."""
    on_gpu = dataclasses.replace(program, layout=dataclasses.replace(program.layout, platform="gpu"))
    e = on_gpu.experiment
    unrolled = dataclasses.replace(e, model=dataclasses.replace(e.model, scan_layers=False))
    unrolled = dataclasses.replace(on_gpu, experiment=unrolled)
    scanned, gpu = (memory.estimate(p, layout.state(program))["activations"] for p in (on_gpu, unrolled))
    assert 0 < gpu == pytest.approx(memory.FUSED * scanned)


def test_scores_are_no_activations():
    """Of a GPU that holds them all either: they are counted by themselves."""

    def kept(vocabulary):
        changes = {"model.vocab_size": vocabulary, "model.num_layers": 1, "global_batch_size": 64}
        e = experiment.resolve(experiment.override(experiment.default_config(), changes))
        e = experiment.complete(e, vocabulary)
        tokens = e.global_batch_size * e.data.sequence_length
        return residuals.kept(layout.prepare(e, Machine.parse("h200:1")), False), tokens

    (many, tokens), (few, _) = kept(50_048), kept(256)
    assert many - few < 0.1 * 4 * tokens * 50_048


def test_a_gpu_s_scores_are_counted_as_they_are_rounded():
    """And by its chip: an H200 holds them all, where a CPU makes chunks of 256 MB."""
    e = experiment.resolve(experiment.override(experiment.default_config(), {"model.vocab_size": 100_096}))
    e = dataclasses.replace(experiment.complete(e, 100_096), global_batch_size=64)
    found = layout.prepare(e, Machine.parse("h200:1"))
    tokens = 64 * found.experiment.data.sequence_length
    assert memory.logits(found.experiment, found.layout) == 2 * 2 * tokens * 100_096


def test_an_encoder_scores_its_targets_alone():
    config = experiment.default_config(objective="mlm")
    changes = CHANGES | {"model.causal": False, "data.sequence_length": 128}
    e = experiment.resolve(experiment.override(config, changes))
    program = layout.prepare(experiment.complete(e, 100), Machine("cpu", 2, 1, (2,), None))
    e = program.experiment
    logits = memory.logits(e, program.layout)
    rows = e.micro_batch // 2  # of a device
    assert logits == 3 * 4 * rows * e.objective.targets_of_row(128) * e.model.padded_vocab


@pytest.mark.slow
def test_it_says_what_it_chose(program, monkeypatch):
    said = chosen(program, total(program, 4) + 1, monkeypatch)[2]
    assert len(said) == 1 and said[0].startswith("memory: 4 micro-batches of 4 rows: ")


@pytest.mark.slow
def test_where_a_gpu_must_make_things_again_the_smallest_does(program, monkeypatch):
    fewest = min(total(program, 8), total(program, 8, remat=True))
    found = chosen(program, fewest + 1, monkeypatch, fillable=fewest - 1)
    assert found[0] == 8 and len(found[2]) == 1


@pytest.mark.slow
def test_what_fits_nowhere_is_an_error(program, monkeypatch):
    with pytest.raises(UserError, match=r"the smallest micro-batch takes .* GB are free; cut the model"):
        chosen(program, 1000.0, monkeypatch)


def test_a_device_that_says_nothing_changes_nothing(program, monkeypatch):
    assert fit.free_memory() is None  # these are CPUs
    assert chosen(program, None, monkeypatch) == (1, False, [])


@pytest.mark.parametrize(("platform", "share"), [("tpu", 1 - memory.RESERVED), ("gpu", 0.76)])
def test_free_memory_is_that_of_the_fullest_device(platform, share, monkeypatch):
    """And of a GPU what its compiler fills before it saves memory at the cost of time."""

    class Device:
        def __init__(self, used):
            self.used, self.platform = used, platform

        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": self.used}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(100), Device(300)])
    assert fit.free_memory(kept=True) == pytest.approx(1000 * share - 300)
    assert fit.free_memory() == pytest.approx(1000 * (1 - memory.RESERVED) - 300)


def test_what_was_chosen_is_kept_on_resume(program):
    old = dataclasses.replace(program.experiment, accumulation=4)
    old = dataclasses.replace(old, model=dataclasses.replace(old.model, remat=True))
    new = dataclasses.replace(program.experiment, accumulation=0)
    kept = carry_on(old, new, extend=False)
    assert (kept.accumulation, kept.model.remat) == (4, True)
    assert carry_on(old, dataclasses.replace(new, accumulation=8), extend=False).accumulation == 8


def test_too_little_memory_is_one_line(program):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
    with pytest.raises(UserError) as caught, out_of_memory.explained(program):
        raise error
    message = str(caught.value)
    assert "\n" not in message
    assert "allocating 9 bytes" in message and "model.remat=true" in message
    assert "--config.accumulation=2 " in message  # the next that divides 16 rows, from 1


def test_the_advice_leaves_every_device_a_row(program):
    """16 rows on four devices are cut into 4 at most."""
    four = dataclasses.replace(program, layout=families.layout_of(data=4))
    for parts, advice in ((1, "accumulation=2 "), (2, "accumulation=4 "), (4, "model.remat=true")):
        one = dataclasses.replace(four, experiment=dataclasses.replace(four.experiment, accumulation=parts))
        with pytest.raises(UserError, match=f"add --config.{advice}"), out_of_memory.explained(one):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def test_an_evaluation_by_batches_needs_their_size():
    """Else what is evaluated would depend on the memory."""
    changes = CHANGES | {"evaluation.batches": 2}
    with pytest.raises(UserError, match=r"set evaluation\.batch_size"):
        experiment.resolve(experiment.override(experiment.default_config(), changes))


def test_other_errors_stay_what_they_are(program):
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        out_of_memory.explained(program),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
