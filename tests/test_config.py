"""Configs on a schema of its own: config.py knows no component."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any

import ml_collections
import pytest

from llm_jax import config as configs
from llm_jax.config import choice, identity, part, runtime
from llm_jax.errors import UserError


@dataclass(frozen=True)
class Rule:
    match: str = identity(".*")
    decay: float = identity(1.0)


@dataclass(frozen=True)
class Adam:
    learning_rate: float = identity(1e-3)
    betas: tuple[float, ...] = identity((0.9, 0.95))
    rules: tuple[Rule, ...] = identity((Rule("scale", 0.0), Rule()))


@dataclass(frozen=True)
class Muon:
    learning_rate: float = identity(0.02)
    iterations: int = identity(5)


@dataclass(frozen=True)
class Model:
    num_layers: int = identity(2)
    activation: str = identity("gelu")
    tied: bool = identity(True)
    remat: str = runtime("none")
    window: int = identity(0, neutral=0)
    size: int = identity(1)


OPTIMIZERS = {"adam": Adam, "muon": Muon}


@dataclass(frozen=True)
class Schema:
    seed: int = identity(0)
    paths: tuple[str, ...] = runtime(("a.txt",))
    model: Model = part(Model)
    optimizer: Any = choice(OPTIMIZERS, "adam")
    max_size: int = identity(8)


DEFAULT = configs.to_config_dict(Schema())
CHANGED = Schema(7, ("b", "c"), Model(3, "relu", False, "full", 9), Adam(0.5, (0.1,), (Rule("x", 0.3),)))
SWITCHED = Schema(optimizer=Muon(iterations=3))


def changed(**changes):
    """Schema with dotted keys (a__b for a.b) changed as on a command line."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return configs.from_dict(Schema, configs.override(Schema, DEFAULT, dotted))


@pytest.mark.parametrize("value", [Schema(), CHANGED, SWITCHED])
def test_round_trip(value):
    config = configs.to_config_dict(value)
    assert isinstance(config, ml_collections.ConfigDict) and config.is_locked
    assert configs.from_dict(Schema, config) == value
    assert configs.from_dict(Schema, configs.to_dict(value)) == value
    assert configs.from_dict(Schema, json.loads(configs.dumps(configs.to_dict(value)))) == value


def test_missing_keys_take_defaults():
    assert configs.from_dict(Schema, {}) == Schema()
    assert configs.from_dict(Schema, {"model": {"tied": False}}) == Schema(model=Model(tied=False))
    assert configs.from_dict(Schema, {"optimizer": {"name": "muon"}}) == Schema(optimizer=Muon())


@pytest.mark.parametrize(
    "key, meant",
    [
        ("sed", "seed"),
        ("size", "max_size"),  # rather than the same word in a section
        ("model.num_layer", "model.num_layers"),
        ("modle.num_layers", "model.num_layers"),
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.num_layers", "model.num_layers"),
        ("model.betas", "optimizer.betas"),
    ],
)
def test_unknown_key_is_answered_with_the_meant_one(key, meant):
    with pytest.raises(UserError, match=rf"config\.{key} .*did you mean config\.{meant}\?"):
        configs.override(Schema, DEFAULT, {key: "1"})
    values = configs.to_dict(Schema())
    *parents, leaf = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = 1
    with pytest.raises(UserError, match=rf"did you mean config\.{meant.split('.')[0]}"):
        configs.from_dict(Schema, values)


def test_meant_key_is_of_the_named_component():
    values = {"optimizer": {"name": "muon", "iteration": 3}}
    with pytest.raises(UserError, match=r"did you mean config\.optimizer\.iterations\?"):
        configs.from_dict(Schema, values)
    with pytest.raises(UserError, match="is not a key"):
        configs.from_dict(Schema, {"optimizer": {"name": "muon", "betas": (0.9,)}})


def test_key_like_no_other_is_refused_without_a_guess():
    with pytest.raises(UserError, match=r"config\.zzzzz is not a key"):
        configs.from_dict(Schema, {"zzzzz": 1})


@pytest.mark.parametrize(
    "values, where",
    [
        ({"seed": 1.0}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": None}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"model": {"tied": 1}}, "model.tied"),
        ({"model": {"activation": 3}}, "model.activation"),
        ({"model": 3}, "model"),
        ({"paths": "a.txt"}, "paths"),
        ({"paths": ("a", 1)}, r"paths\[1\]"),
        ({"optimizer": {"name": "adam", "learning_rate": True}}, "optimizer.learning_rate"),
        ({"optimizer": {"name": "adam", "learning_rate": "1"}}, "optimizer.learning_rate"),
        ({"optimizer": {"name": "adam", "betas": 0.9}}, "optimizer.betas"),
        ({"optimizer": {"name": "adam", "rules": [{"decay": "x"}]}}, r"optimizer.rules\[0\].decay"),
        ({"optimizer": "muon"}, "optimizer"),
        ({"optimizer": {"name": ["muon"]}}, "optimizer.name"),
    ],
)
def test_wrong_type_names_the_key(values, where):
    with pytest.raises(UserError, match=rf"config\.{where} "):
        configs.from_dict(Schema, values)


def test_int_stands_for_float_and_list_for_tuple():
    got = configs.from_dict(Schema, {"optimizer": {"name": "adam", "learning_rate": 1, "betas": [0, 1]}})
    assert got.optimizer == Adam(1.0, (0.0, 1.0))
    assert isinstance(got.optimizer.learning_rate, float) and isinstance(got.optimizer.betas[0], float)


def test_override_reads_strings_by_type():
    got = changed(
        seed="3", model__tied="false", model__activation="3", optimizer__learning_rate="3e-4", paths="x*.txt"
    )
    model, optimizer = Model(tied=False, activation="3"), Adam(3e-4)
    assert got == Schema(3, ("x*.txt",), model, optimizer)
    assert changed(model__tied="True").model.tied is True
    assert changed(optimizer__learning_rate="1").optimizer.learning_rate == 1.0


def test_override_reads_tuples():
    assert changed(optimizer__betas="0.8").optimizer.betas == (0.8,)
    assert changed(optimizer__betas="(0.8, 1)").optimizer.betas == (0.8, 1.0)
    assert changed(optimizer__betas="[]").optimizer.betas == ()
    assert changed(optimizer__rules='[{"match": "y"}]').optimizer.rules == (Rule("y"),)
    assert changed(paths=["x", "y"]).paths == ("x", "y")


@pytest.mark.parametrize(
    "key, text", [("seed", "x"), ("seed", "1.5"), ("model.tied", "yes"), ("seed", "{[]: 1}"), ("model", "x")]
)
def test_override_refuses_text_of_another_type(key, text):
    with pytest.raises(UserError, match=rf"config\.{key} "):
        configs.from_dict(Schema, configs.override(Schema, DEFAULT, {key: text}))


def test_override_leaves_its_argument_alone():
    before = DEFAULT.to_json()
    changed(seed="5", optimizer__name="muon")
    assert DEFAULT.to_json() == before


def test_name_switch_gives_the_other_components_defaults():
    assert changed(optimizer__name="muon") == Schema(optimizer=Muon())
    # Whatever the order of the flags, and although learning_rate exists in both.
    assert changed(optimizer__iterations="9", optimizer__name="muon").optimizer == Muon(iterations=9)
    assert changed(optimizer__learning_rate="0.5", optimizer__name="muon").optimizer == Muon(0.5)
    with pytest.raises(UserError, match=r"config\.optimizer\.name is 'sgd'; choose one of adam, muon"):
        changed(optimizer__name="sgd")


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return (*value, value[0]) if isinstance(value, tuple) else value + type(value)(1)


def with_leaf(component, path, value):
    head, _, rest = path.partition(".")
    inner = with_leaf(getattr(component, head), rest, value) if rest else value
    return replace(component, **{head: inner})


def test_fingerprint_changes_with_every_identity_field_alone():
    base = CHANGED  # no field at its neutral value
    names, original = [], configs.fingerprint(base)
    for path, value in configs.leaves(base):
        if path.endswith(".name"):
            continue
        fingerprint = configs.fingerprint(with_leaf(base, path, other(value)))
        names.append(fingerprint)
        is_runtime = path in ("paths", "model.remat")
        assert (fingerprint == original) == is_runtime, path
    assert len(set(names)) == len(names) - 1  # the two runtime fields give the original
    assert configs.fingerprint(replace(base, optimizer=Muon())) != original


def test_fingerprint_covers_content_and_schema_version(monkeypatch):
    plain = configs.fingerprint(Schema())
    assert configs.fingerprint(Schema(), data="a") not in (plain, configs.fingerprint(Schema(), data="b"))
    monkeypatch.setattr(configs, "SCHEMA_VERSION", configs.SCHEMA_VERSION + 1)
    assert configs.fingerprint(Schema()) != plain


def test_field_added_later_leaves_old_fingerprints():
    added = [("momentum", float, identity(0.0, neutral=0.0)), ("speed", int, runtime(1))]
    newer = dataclasses.make_dataclass("Newer", added, bases=(Muon,), frozen=True)
    assert configs.fingerprint(newer()) == configs.fingerprint(Muon())
    assert configs.fingerprint(newer(speed=2)) == configs.fingerprint(Muon())
    assert configs.fingerprint(newer(momentum=0.9)) != configs.fingerprint(Muon())


def test_fingerprint_is_the_same_for_ever():
    assert configs.fingerprint(Schema(), data="0") == "180e5a96d899b302"


def test_differences():
    assert configs.differences(Schema(), Schema()) == {}
    moved = Schema(model=Model(remat="full", num_layers=3))
    wanted = {"model.num_layers": (2, 3), "model.remat": ("none", "full")}
    assert configs.differences(Schema(), moved) == wanted
    assert configs.differences(Schema(), moved, only_identity=True) == {"model.num_layers": (2, 3)}
    got = configs.differences(Schema(), SWITCHED)
    assert got["optimizer.name"] == ("adam", "muon")
    assert got["optimizer.iterations"] == (None, 3) and got["optimizer.betas"] == ((0.9, 0.95), None)


def test_field_must_say_what_it_is():
    unmarked = dataclasses.make_dataclass("Unmarked", [("x", int, field(default=1))], frozen=True)
    with pytest.raises(KeyError, match="identity"):
        configs.fingerprint(unmarked())


def test_dumps_refuses_what_json_cannot_hold():
    with pytest.raises(ValueError):
        configs.dumps({"x": float("nan")})
