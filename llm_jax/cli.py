"""What every entry point shares: a config file, dotted overrides, and errors in one line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from llm_jax.errors import UserError

PREFIX = "--config."


def main(function: Callable[[], None]) -> None:
    """Runs an entry point. A UserError becomes one line on stderr and its exit code, 2 for bad input."""
    try:
        function()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, str]]:
    """Flags, and the overrides ``--config.KEY=VALUE`` (or ``--config.KEY VALUE``) as {key: value}."""
    rest, overrides = [], {}
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument.startswith(PREFIX):
            key, equals, value = argument.removeprefix(PREFIX).partition("=")
            overrides[key] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return parser.parse_args(rest), overrides


def pairs(flag: str, text: str) -> dict[str, str]:
    """``A=x,B=y`` as {"A": "x", "B": "y"}. Raises UserError, naming the flag, for anything else."""
    found = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise UserError(f"{flag}={text}: write NAME=VALUE, several joined by commas")
        found[key] = value
    return found


def load_config(spec: str) -> ml_collections.ConfigDict:
    """The config of ``configs/NAME.py`` or ``configs/NAME.py:ARGUMENT``, from its ``get_config(arg)``; or of
    the ``config.json`` of a run, to train the same again."""
    path = Path(spec.partition(":")[0])
    if path.suffix == ".json":
        return _stored(path)
    return _call(spec, "get_config")


def load_sweep(spec: str) -> list[dict[str, Any]]:
    """The points of a config file, from its ``sweep(arg)``; see scaling/points.py."""
    return list(_call(spec, "sweep"))


def load_ladder(spec: str) -> Any:
    """The ladder of a config file, from its ``ladder(arg)``; see scaling/ladder.py."""
    return _call(spec, "ladder")


def _call(spec: str, name: str) -> Any:
    """What a function of a config file gives."""
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file; the shipped ones are in configs/")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"--config={path} has no function {name}(arg='')")
    function = getattr(module, name)
    return function(argument) if argument else function()


def _stored(path: Path) -> ml_collections.ConfigDict:
    if not path.is_file():
        raise UserError(f"--config={path}: no such file")
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text())["config"]).lock()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--config={path} is not the config.json of a run ({error})") from None
