"""What a device's memory being too small looks like, and what to do about it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax

from llm_jax.errors import UserError
from llm_jax.training.program import Program

CUT = "--config.mesh.recipe=fsdp on more devices"


def said(message: str) -> str:
    """What an error of XLA says of memory, in one line; "" if it says something else."""
    found = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    if found:
        return f"the compiler needs {found[1]} of {found[2]}"
    if "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower():
        return message.splitlines()[0]
    return ""


@contextlib.contextmanager
def explained(program: Program) -> Iterator[None]:
    """An error for want of memory becomes a UserError that says what to change. The state in memory is lost,
    the newest checkpoint is not."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not (found := said(str(error))):
            raise
        e = program.experiment
        most = e.global_batch_size // program.layout.ways("batch")  # a row on each device
        more = (n for n in range(e.accumulation + 1, most + 1) if most % n == 0)
        cuts = [f"--config.accumulation={n}" for n in [next(more, 0)] if n]
        cuts += [] if e.model.remat else ["--config.model.remat=true"]
        raise UserError(
            f"a device has too little memory ({found[:200]}): add {' or '.join([*cuts, CUT])}; "
            "the same command then goes on from the newest checkpoint"
        ) from error
