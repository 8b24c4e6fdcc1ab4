"""Programs over several sources: what they train on, and every set they are judged on."""

import dataclasses
import math
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import flags
from llm_jax.errors import UserError
from llm_jax.planning import layout
from llm_jax.text import shards
from llm_jax.training import experiment, loop, metrics
from llm_jax.training.program import Program
from llm_jax.training.samples import sample_text

pytestmark = pytest.mark.slow

WEIGHTS = {"prose": 3.0, "code": 1.0}


def words(seed, count):
    """Texts of a seed's own words."""
    rng = np.random.default_rng(seed)
    numbers = [rng.integers(0, 20, rng.integers(3, 40)) for _ in range(count)]
    return [" ".join(f"w{'oai'[seed]}rd{i}é" for i in some) for some in numbers]


def config_of(root, **changes):
    config = experiment.default_config(objective=changes.pop("objective", "clm"), tokenizer="byte")
    sources = [
        {"name": name, "text": (str(root / name),), "weight": weight, "max_epochs": 2}
        for name, weight in WEIGHTS.items()
    ]
    base = {
        "data.sources": sources,
        "data.validation_fraction": 0.3,
        "data.sequence_length": 16,
        "evaluation.sets": ({"name": "news", "text": (str(root / "news"),)},),
        "model.num_layers": 1,
        "model.model_dim": 16,
        "model.num_heads": 2,
        "steps": 4,
        "schedule.warmup_steps": 1,
        "samples.tokens": 2,
    }
    return experiment.override(config, base | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Texts of two sources and of a set, a file a document."""
    root = tmp_path_factory.mktemp("texts")
    for seed, (name, count) in enumerate({"prose": 30, "code": 25, "news": 5}.items()):
        (root / name).mkdir()
        for i, text in enumerate(words(seed, count)):
            (root / name / f"{i}.txt").write_text(text)
    return root


def program_of(root, **changes):
    """Programs that share one shard set."""
    resolved = experiment.resolve(config_of(root, **changes))
    return Program.prepare(resolved, root / "data", say=lambda _: None)


@pytest.fixture(scope="module")
def program(root):
    return program_of(root)


@pytest.fixture(scope="module")
def params(program):
    return program.init().params


@pytest.fixture(scope="module")
def results(program, params):
    return program.evaluate_all(params)


def test_every_set_is_reported_by_name(results):
    assert list(results) == ["validation", "validation.prose", "validation.code", "test.news"]
    for result in results.values():
        assert {"loss", "accuracy", "perplexity", "targets", "bits_per_byte"} <= set(result)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_one_set_is_what_it_is_among_all(program, params, results):
    assert program.evaluate(params) == results["validation"]
    for name, result in results.items():
        assert program.evaluate_set(params, name) == result


def test_every_target_of_a_set_counts_once(program, results):
    for name in ("validation.prose", "validation.code", "test.news"):
        source = program.splits.rows(name).source
        assert results[name]["targets"] == source.tokens - len(source.ends)  # all but the first of each


def test_overall_weighs_the_sources_as_training_does(results):
    prose, code, both = (results[f"validation{name}"] for name in (".prose", ".code", ""))
    for key in ("loss", "accuracy"):
        assert both[key] == pytest.approx(0.75 * prose[key] + 0.25 * code[key])
    assert both["targets"] == prose["targets"] + code["targets"]
    bytes_of = [r["loss"] / r["bits_per_byte"] for r in (prose, code)]
    assert both["bits_per_byte"] == pytest.approx(both["loss"] / (0.75 * bytes_of[0] + 0.25 * bytes_of[1]))


def test_bits_of_a_text_are_its_targets_nats(program, results):
    """With every target evaluated: the sum of -log2 p over the length of the files, counted here."""
    size = sum(len(text.encode()) for text in words(2, 5))
    result = results["test.news"]
    bits = result["loss"] * result["targets"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / size)
    assert program.splits.rows("test.news").source.text_bytes == size


@pytest.mark.parametrize("rows, markers", [("packed", True), ("contiguous", True), ("contiguous", False)])
def test_bytes_of_a_target(root, tmp_path, rows, markers):
    """Text bytes over the targets that the rows have, whichever way they are cut; to the stream's first."""
    resolved = experiment.resolve(config_of(root, **{"data.rows": rows, "data.markers": markers}))
    one = Program.prepare(resolved, tmp_path / "data", say=lambda _: None)
    cut = one.splits.rows("validation.prose")
    weights = one._to_batch(0)(cut.read(np.arange(len(cut))), np.arange(len(cut))).weights
    per_target = cut.source.text_bytes / (weights.sum() + (rows == "contiguous"))
    assert one.splits.bytes_per_target("validation.prose") == pytest.approx(per_target)


def test_a_model_that_knows_nothing_has_the_bits_of_its_vocabulary(program, params):
    """Every id of the byte tokenizer equally likely: log2(261) bits a target, and one marker a document."""
    blank = jax.tree.map(jnp.zeros_like, params)
    result = program.evaluate_set(blank, "test.news")
    source = program.splits.rows("test.news").source
    size = source.text_bytes
    assert result["bits_per_byte"] == pytest.approx(math.log2(261) * (size + 5) / size, rel=1e-5)


def test_bits_per_byte_of_a_few_batches_is_an_estimate_not_a_part(root, params, results):
    """The ratio to the loss is that of the whole split."""
    few = program_of(root, **{"evaluation.batches": 1}).evaluate_all(params)
    for name, result in few.items():
        assert 0 < result["targets"] < results[name]["targets"]
        if name != "validation":
            ratio = results[name]["bits_per_byte"] / results[name]["loss"]
            assert result["bits_per_byte"] / result["loss"] == pytest.approx(ratio)


def test_an_encoder_has_no_bits_per_byte(root):
    program = program_of(root, objective="mlm", **{"model.causal": False})
    results = program.evaluate_all(program.init().params)
    assert list(results) == ["validation", "validation.prose", "validation.code", "test.news"]
    assert not any("bits_per_byte" in result for result in results.values())


def test_an_encoder_without_a_blank_to_fill_writes_nothing(root):
    """The default config of one trains to its end."""
    program = program_of(root, objective="mlm", **{"model.causal": False})
    assert sample_text(program, None) == ""


def test_a_prompt_longer_than_a_row_ends_no_run_at_its_end(root, tmp_path):
    """An encoder's is refused before the first step."""
    changes = {"model.causal": False, "samples.prompt": f"a long one {'word ' * 9}<mask>"}
    config = experiment.resolve(config_of(root, objective="mlm", **changes))
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens; this model reads 16"):
        loop.run(config, tmp_path / "run", say=lambda _: None)
    assert list(metrics.read(tmp_path / "run" / "metrics")) == []


@pytest.mark.parametrize("changes", [{}, {"objective.name": "mlm", "model.causal": False}])
def test_what_a_plan_compiles_is_what_a_run_is_fed(root, changes):
    """An encoder's places of the targets, too: else its head is compiled for every token."""
    one = program_of(root, **changes)

    def like(batch):
        return jax.tree.map(lambda x: (x.shape, x.dtype), batch)

    assert like(layout.dispatch(one)) == like(one.batches[0])


def test_a_set_that_is_not_there_is_named(program, params):
    with pytest.raises(UserError, match=r"no split 'test\.poems' but test\.news, train\.code, "):
        program.evaluate_set(params, "test.poems")


def test_one_source_alone_is_the_validation_set(root, program, params, results):
    only = config_of(root)
    only["data"]["sources"] = only["data"]["sources"][:1]
    one = Program.prepare(experiment.resolve(only), root / "data", say=lambda _: None)
    alone = one.evaluate_all(params)
    assert list(alone) == ["validation", "test.news"]
    assert alone["validation"] == results["validation.prose"]


def test_training_rows_come_from_the_sources_by_weight(root, program):
    """Found again by their tokens, over as many steps as fit into a block of the mixture."""
    cuts = {name: program.splits.rows(f"train.{name}") for name in WEIGHTS}
    known = {
        tuple(row[:-1]): name for name, cut in cuts.items() for row in cut.read(np.arange(len(cut))).tokens
    }
    steps = 256 // program.experiment.global_batch_size
    seen = [known[tuple(row)] for i in range(steps) for row in np.asarray(program.batches[i].inputs)[0, 0]]
    assert min(len(cut) for cut in cuts.values()) * 2 > 64
    assert {name: seen.count(name) for name in WEIGHTS} == {"prose": 192, "code": 64}


@pytest.mark.parametrize("rows", ["contiguous", "shifted", "packed"])
def test_an_encoder_is_fed_rows_without_padding_and_knows(root, rows):
    """Through two epochs; a decoder's last row of an epoch ends in padding, which it does not see."""
    small = {"data.rows": rows, "global_batch_size": 8}
    encoder = program_of(root, objective="mlm", **{"model.causal": False}, **small)
    decoder, seen = program_of(root, **small), []
    epochs = 2 * sum(len(encoder.splits.rows(f"train.{name}")) for name in WEIGHTS)
    for program in (encoder, decoder):
        batches = [program.batches[i] for i in range(epochs // 8)]
        seen.append(all(np.asarray(batch.segments).all() for batch in batches))
    assert (encoder.unpadded, decoder.unpadded) == (rows != "packed", False)
    assert seen == [rows != "packed", False]


@pytest.mark.parametrize(
    ("platform", "devices", "activation", "causal", "blocks"),
    [
        ("gpu", 1, "gelu", False, True),
        ("gpu", 1, "gelu", True, False),
        ("gpu", 1, "swiglu", False, False),
        ("gpu", 2, "gelu", False, False),
        ("cpu", 1, "gelu", False, False),
    ],
)
def test_steps_are_compiled_by_blocks_where_that_is_faster(
    root, platform, devices, activation, causal, blocks
):
    model = {"model.activation": activation, "model.causal": causal}
    one = program_of(root, objective="clm" if causal else "mlm", **model)
    layout = dataclasses.replace(families.layout_of(data=devices), platform=platform)
    assert (dataclasses.replace(one, layout=layout).compiler_options is flags.BLOCKS) == blocks


def test_more_steps_than_the_epochs_allow_are_refused(root, program):
    limit = program.splits.training.limit
    rows = {name: len(program.splits.rows(f"train.{name}")) for name in WEIGHTS}
    assert limit == 2 * sum(rows.values())
    program_of(root, steps=limit // 8)
    steps, each = limit // 8 + 1, f"prose 2 x {rows['prose']}, code 2 x {rows['code']}"
    message = (
        rf"steps={steps} x global_batch_size=8 needs {8 * steps:,} rows, but .* allow {limit:,} \({each}\); "
        f"raise max_epochs, or take {steps - 1:,} steps"
    )
    with pytest.raises(UserError, match=message):
        program_of(root, steps=steps)


def test_a_run_is_read_on_devices_that_its_mesh_does_not_fit(root, tmp_path, monkeypatch, capsys):
    config = experiment.override(config_of(root), {"mesh.data": 8, "steps": 2})
    last = loop.run(experiment.resolve(config), tmp_path / "run", say=lambda _: None)
    three = jax.devices()[:3]
    monkeypatch.setattr(jax, "devices", lambda *_: three)
    program, state = Program.restore(tmp_path / "run")
    assert program.layout.mesh.shape["fsdp"] == program.layout.mesh.size == 2
    assert "(data=8) does not fit 3 devices" in capsys.readouterr().err
    assert program.evaluate_all(state.params)["validation"]["loss"] == pytest.approx(last["loss"], abs=1e-5)


def test_a_run_writes_every_set_and_goes_on_with_another(root, tmp_path):
    """A set named later joins a run that has begun, which stays the same run, and needs its text no more."""
    root = shutil.copytree(root, tmp_path / "texts", ignore=shutil.ignore_patterns("data"))
    config = config_of(root)
    last = loop.run(experiment.resolve(config), tmp_path / "run", say=lambda _: None)
    story = metrics.read(tmp_path / "run" / "metrics")
    names = ["validation", "validation.prose", "validation.code", "test.news"]
    assert [r["set"] for r in story if r["kind"] == "evaluation"] == names
    assert last["set"] == "validation" and last == next(r for r in story if r["kind"] == "evaluation")

    more = (*config.evaluation.sets, {"name": "again", "text": (str(root / "news"),)})
    named = experiment.resolve(experiment.override(config, {"evaluation.sets": more}))
    assert loop.run(named, tmp_path / "run", say=lambda _: None) == last
    assert set(shards.read_header(tmp_path / "run" / "data")["sets"]) == {"news", "again"}
    shutil.rmtree(root)
    program, state = Program.restore(tmp_path / "run")
    again = program.evaluate_all(state.params)
    assert again["test.again"] == again["test.news"] and again["validation"]["loss"] == last["loss"]
