"""The order of the rooms: a module imports only from rooms above it. The list is the house plan's, but
that hardware stands above flags and mesh, which ask it how many GPUs there are."""

import ast
from pathlib import Path

import llm_jax

ROOMS = [
    "errors",
    "config",
    "hardware",
    "hosts",
    "flags",
    "layout",
    "mesh",
    "storage",
    "text",
    "data",
    "models",
    "objectives",
    "inference",
    "training",
    "planning",
    "scaling",
    "report",
    "cli",
]
ROOT = Path(llm_jax.__file__).parent


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llm_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llm_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("llm_jax."))


def test_every_module_has_a_room():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert rooms - {"__init__"} == set(ROOMS)


def test_imports_point_up():
    wrong = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
        for room in imported_rooms(path)
        if ROOMS.index(room) > ROOMS.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    ]
    assert not wrong


def test_nothing_forbidden_is_imported():
    for path in [*ROOT.rglob("*.py"), *ROOT.parent.glob("scripts/*.py")]:
        text = path.read_text()
        for name in ("import torch", "import tensorflow", "flax.nnx", "from flax import nnx"):
            assert name not in text, f"{path.name}: {name}"
