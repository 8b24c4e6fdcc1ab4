"""Into how many micro-batches a step is cut, and whether blocks are recomputed, by the memory of a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax

from llm_jax import hosts
from llm_jax.errors import UserError
from llm_jax.planning import layout, memory
from llm_jax.training.program import Program

# How much of what jax may take of a GPU a step fills before XLA makes parts of it again, without a word: 0.8
# times its slop factor of 0.95. With too little memory that was a tenth of GPT-2's step (log).
KEPT = {"gpu": 0.76}
# Below so many tokens at a time on a device, recomputing blocks costs less than smaller micro-batches: their
# products no longer fill an accelerator. Not measured: a guess at what 132 multiprocessors want.
FEWEST_TOKENS = 8192


def fit(program: Program, say: Callable[[str], None]) -> Program:
    """The program with the fewest micro-batches whose step fits every device's free memory, of a GPU's KEPT;
    else the smallest, if it fits at all. Blocks are recomputed where micro-batches would otherwise get
    smaller than FEWEST_TOKENS. Unchanged where a device does not say what it has, as CPUs do not.

    Raises UserError where nothing fits.
    """
    free, fillable = free_memory(), free_memory(kept=True)
    if free is None:
        return program
    state, found = layout.state(program), []
    for candidate in _candidates(program):
        found.append((memory.estimate(candidate, state)["total"], candidate))
        if found[-1][0] <= fillable:
            break
    needed, chosen = min(found, key=lambda one: (one[0] > fillable, one[0]))
    e = chosen.experiment
    if needed > free:
        raise UserError(
            f"config.accumulation=0: the smallest micro-batch takes {needed / 1e9:.1f} GB of a device, "
            f"{free / 1e9:.1f} GB are free; cut the model (mesh.recipe=fsdp, mesh.tensor), or shorten "
            "data.sequence_length"
        )
    again = ", blocks recomputed" if e.model.remat else ""
    say(
        f"memory: {e.accumulation} micro-batches of {e.micro_batch} rows{again}: "
        f"{needed / 1e9:.1f} of {free / 1e9:.1f} GB free on a device"
    )
    return chosen


def free_memory(kept: bool = False) -> float | None:
    """Bytes that a program may still take of the fullest device, kept: before it makes things again; None
    where one does not say."""
    devices = jax.local_devices()
    share = 1 - memory.RESERVED
    if kept:
        share = KEPT.get(devices[0].platform, share)
    said = [device.memory_stats() or {} for device in devices]
    own = [share * s["bytes_limit"] - s.get("bytes_in_use", 0) for s in said if "bytes_limit" in s]
    everywhere = hosts.gather("memory", min(own) if len(own) == len(said) else None)
    return None if None in everywhere else min(everywhere)


def _candidates(program: Program) -> Iterator[Program]:
    """From what is fastest to what takes least."""
    e, devices = program.experiment, program.layout.ways("batch")
    rows, length = e.global_batch_size, e.data.sequence_length // program.layout.ways("length")
    cuts = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n % devices == 0]
    filling = [n for n in cuts if rows // n // devices * length >= FEWEST_TOKENS] or cuts[:1]
    order = [(n, True) for n in cuts]
    if not e.model.remat:
        order = [(n, False) for n in filling] + order + [(n, False) for n in cuts if n not in filling]
    for accumulation, remat in order:
        model = dataclasses.replace(e.model, remat=remat)
        changed = dataclasses.replace(e, accumulation=accumulation, model=model)
        yield dataclasses.replace(program, experiment=changed)
