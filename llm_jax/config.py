"""Configs: ``ml_collections.ConfigDict`` at the edge, frozen dataclasses inside.

Every component keeps its own small frozen dataclass beside its code. A field is either *identity*
(it changes the numbers of a run: model, objective, data order, optimiser, seed) or *runtime* (it
changes only how or where they are computed: mesh, remat, cadences, paths). This file turns a
ConfigDict into those dataclasses and back, checks keys and types, applies overrides and takes
fingerprints. It knows no component.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from llm_jax.errors import UserError

SCHEMA_VERSION = 1
NAME = "name"  # the key that says which of several components a section configures

# ---- declaring fields -----------------------------------------------------------------------


def identity(default: Any, neutral: Any = dataclasses.MISSING) -> Any:
    """A field that is part of what a run *is*.

    neutral: for a field added after the first release, the value at which the code behaves as it did
    before; at that value the field stays out of fingerprints, so that old runs keep their names.
    """
    return dataclasses.field(default=default, metadata={"identity": True, "neutral": neutral})


def runtime(default: Any) -> Any:
    """A field that may change when a run is resumed."""
    return dataclasses.field(default=default, metadata={"identity": False})


def part(component: type) -> Any:
    """A section with one possible component."""
    return dataclasses.field(default_factory=component, metadata={"part": component})


def choice(table: Mapping[str, type], default: str) -> Any:
    """A section whose component is picked from ``table`` by its ``name`` key."""
    return dataclasses.field(default_factory=table[default], metadata={"table": table})


# ---- dataclasses <-> plain dicts <-> ConfigDict ---------------------------------------------


def to_dict(component: Any) -> dict[str, Any]:
    """Nested plain dict of a dataclass instance; sections with a choice carry its ``name``."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        table = field.metadata.get("table")
        if table:
            out[field.name] = {NAME: _name_of(table, type(value)), **to_dict(value)}
        elif dataclasses.is_dataclass(value):
            out[field.name] = to_dict(value)
        elif isinstance(value, tuple):
            out[field.name] = tuple(
                to_dict(item) if dataclasses.is_dataclass(item) else item for item in value
            )
        else:
            out[field.name] = value
    return out


def to_config_dict(component: Any) -> ml_collections.ConfigDict:
    """The same as a locked ConfigDict, which is what config files edit and return."""
    return ml_collections.ConfigDict(to_dict(component)).lock()


def from_dict(schema: type, values: Mapping[str, Any] | ml_collections.ConfigDict) -> Any:
    """Builds ``schema`` from nested values. Missing keys take their defaults; a chosen component is named.

    Raises UserError for an unknown key (with the closest real one) or a value of the wrong type.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return _build(schema, values, path="", root=(schema, values))


def _build(schema: type, values: Mapping[str, Any], path: str, root: tuple[type, Mapping]) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"config.{path} is a section of keys, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    kwargs = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if key not in fields:
            raise _unknown_key(where, *root)
        field = fields[key]
        if "table" in field.metadata:
            component = _pick(field.metadata["table"], value, where)
            rest = {k: v for k, v in value.items() if k != NAME} if isinstance(value, Mapping) else value
            kwargs[key] = _build(component, rest, where, root)
        elif "part" in field.metadata:
            kwargs[key] = _build(field.metadata["part"], value, where, root)
        else:
            kwargs[key] = _typed(hints[key], value, where, root)
    return schema(**kwargs)


def _pick(table: Mapping[str, type], value: Any, path: str) -> type:
    name = value.get(NAME) if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in table:
        raise UserError(f"config.{path}.{NAME} is {name!r}; choose one of {', '.join(table)}")
    return table[name]


def _name_of(table: Mapping[str, type], component: type) -> str:
    return next(name for name, candidate in table.items() if candidate is component)


def _typed(hint: Any, value: Any, path: str, root: tuple[type, Mapping]) -> Any:
    """``value`` as ``hint``: an int may stand for a float, a list for a tuple; nothing else bends."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(hint, value, path)
        item = typing.get_args(hint)[0]
        return tuple(_typed(item, entry, f"{path}[{i}]", root) for i, entry in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, root)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(hint, value, path)
    return value


def _wrong_type(hint: Any, value: Any, path: str) -> UserError:
    wanted = str(hint) if isinstance(hint, types.GenericAlias) else hint.__name__
    return UserError(f"config.{path} must be {wanted}, not {value!r} ({type(value).__name__})")


# ---- overrides ------------------------------------------------------------------------------


def override(
    schema: type, config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A copy of ``config`` with dotted keys changed, as by ``--config.optimizer.learning_rate=3e-4``.

    String values are read as the field's type. Changing a section's ``name`` gives it the defaults
    of the newly named component, before any other change is applied.
    """
    values = config.to_dict()
    # --config.objective=mlm is short for --config.objective.name=mlm
    sections = [field.name for field in _fields(schema).values() if "table" in field.metadata]
    changes = {f"{k}.{NAME}" if k in sections else k: v for k, v in changes.items()}
    for key in sorted(changes, key=lambda key: key.rpartition(".")[2] != NAME):
        *parents, leaf = key.split(".")
        section, component = values, schema
        for parent in parents:
            field = _fields(component).get(parent)
            if field is None or not isinstance(section.get(parent), dict):
                raise _unknown_key(key, schema, values)
            if leaf == NAME and parent == parents[-1] and "table" in field.metadata:
                picked = _pick(field.metadata["table"], changes[key], ".".join(parents))
                section[parent] = {NAME: changes[key], **to_dict(picked())}
            section = section[parent]
            component = _component(field, section)
        if leaf == NAME and NAME in section:
            continue
        if leaf not in _fields(component):
            raise _unknown_key(key, schema, values)
        hint = typing.get_type_hints(component)[leaf]
        value = changes[key]
        if dataclasses.is_dataclass(hint):
            raise UserError(f"config.{key} is a section of keys; set one of them, not {value!r}")
        section[leaf] = _parse(hint, value, key) if isinstance(value, str) else value
    return ml_collections.ConfigDict(values).lock()


def _fields(component: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(component)}


def _component(field: dataclasses.Field, section: Mapping[str, Any]) -> type:
    table = field.metadata.get("table")
    return table[section[NAME]] if table else field.metadata["part"]


def _parse(hint: Any, text: str, path: str) -> Any:
    """A command-line string as a value of type ``hint``."""
    if hint is str:
        return text
    if typing.get_origin(hint) is tuple and not text.startswith(("(", "[")):
        return (_parse(typing.get_args(hint)[0], text, path),)
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        raise _wrong_type(hint, text, path) from None


def _unknown_key(key: str, schema: type, values: Mapping[str, Any]) -> UserError:
    known = [path for path, _ in leaves(_lenient(schema, values))]
    ends = {path.rpartition(".")[2]: path for path in known}
    leaf = key.rpartition(".")[2]
    same = [path for path in known if "." in key and path.rpartition(".")[2] == leaf]
    pool = known if "." in key else [*known, *_fields(schema)]
    close = (
        difflib.get_close_matches(key, same, n=1, cutoff=0.0)  # the right name in the wrong section
        or difflib.get_close_matches(key, pool, n=1, cutoff=0.6)
        or [ends[name] for name in difflib.get_close_matches(leaf, list(ends), n=1, cutoff=0.6)]
    )
    meant = f"did you mean config.{close[0]}?" if close else "see --print-config for the keys"
    return UserError(f"config.{key} is not a key of this config; {meant}")


def _lenient(schema: type, values: Mapping[str, Any]) -> Any:
    """The default instance of ``schema``, with the components that ``values`` names."""
    picked = {}
    for field in dataclasses.fields(schema):
        table = field.metadata.get("table")
        section = values.get(field.name)
        if table and isinstance(section, Mapping) and section.get(NAME) in table:
            picked[field.name] = table[section[NAME]]()
    return schema(**picked)


# ---- identity -------------------------------------------------------------------------------


def leaves(component: Any, only_identity: bool = False, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field, in declaration order, neutral additions left out."""
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        where = f"{path}.{field.name}" if path else field.name
        if "table" in field.metadata:
            yield f"{where}.{NAME}", _name_of(field.metadata["table"], type(value))
        if "table" in field.metadata or "part" in field.metadata:
            yield from leaves(value, only_identity, where)
        elif not only_identity or (field.metadata["identity"] and value != field.metadata["neutral"]):
            yield where, _identity_of(value) if only_identity else value


def _identity_of(value: Any) -> Any:
    """A field's value with the runtime fields and neutral additions left out, where it is made of
    dataclasses."""
    if isinstance(value, tuple):
        return tuple(_identity_of(item) for item in value)
    return dict(leaves(value, only_identity=True)) if dataclasses.is_dataclass(value) else value


def fingerprint(component: Any, **content: str) -> str:
    """16 hex digits over the identity fields, the schema version and the given content hashes."""
    payload = {
        "schema": SCHEMA_VERSION,
        "identity": dict(leaves(component, only_identity=True)),
        "content": content,
    }
    return hashlib.sha256(dumps(payload).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, only_identity: bool = False) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} where two instances differ; absent is None."""
    a, b = dict(leaves(old, only_identity)), dict(leaves(new, only_identity))
    keys = list(dict.fromkeys([*a, *b]))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def changed(schema: type, component: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (default, value)} where ``component`` differs from the defaults of the components that it
    names; the names themselves are compared with the schema's own choice."""
    plain = dict(leaves(schema()))
    beside = dict(leaves(_lenient(schema, to_dict(component))))
    named = {key: plain[key] if key.endswith(f".{NAME}") else value for key, value in beside.items()}
    return {key: (named[key], value) for key, value in leaves(component) if named[key] != value}


def dumps(values: Any, indent: int | None = None) -> str:
    """JSON of plain values and of dataclasses inside them, keys sorted when not for reading."""
    return json.dumps(
        values, indent=indent, sort_keys=indent is None, default=dataclasses.asdict, allow_nan=False
    )
