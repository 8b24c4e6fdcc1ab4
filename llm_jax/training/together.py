"""Several runs as one program: equal but for seed and learning rate, which are numbers given to it.

No shape depends on these two, so one compilation serves all members, and an accelerator that one small model
leaves idle has all of them to do at once. A member's last bits may depend on how many it is compiled with: a
group keeps its members (scaling/groups.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import config as configs
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.training import step
from llm_jax.training.experiment import Experiment
from llm_jax.training.program import Program
from llm_jax.training.state import State
from llm_jax.training.step import Metrics

FREE = ("seed", "optimizer.learning_rate")
# checkpoint.at: other runs may branch off some members; all are saved there.
UNSEEN = (*FREE, "checkpoint.at")
ALONE = {
    "evaluation.patience": "runs that are trained together end together",
    "init_from": "only runs with fresh parameters are trained together",
    "logging.profile": "a profile is of one run",
    "logging.wandb_project": "W&B follows one run a process",
}


def alone(e: Experiment) -> str:
    """The key for which a run cannot be trained together with others; "" for none."""
    values = dict(configs.leaves(e))
    return next((key for key in ALONE if values[key]), "" if e.accumulation else "accumulation")


def alike(e: Experiment) -> str:
    """Equal for runs that can be one program, if neither must be alone."""
    return configs.dumps({key: value for key, value in configs.leaves(e) if key not in UNSEEN})


def check(experiments: Sequence[Experiment]) -> None:
    """Raises UserError, with the key, for runs that cannot be one program, and for two that are the same."""
    first = experiments[0]
    for e in experiments:
        if key := alone(e):
            why = ALONE.get(key, "what memory allows is not known of several runs: give a number")
            raise UserError(f"config.{key}={dict(configs.leaves(e))[key]!r}: {why}")
        differ = [key for key in configs.differences(first, e) if key not in UNSEEN]
        if differ:
            raise UserError(
                f"config.{differ[0]} differs: runs that are trained together share all but {FREE}"
            )
    if len({tuple(dict(configs.leaves(e))[key] for key in FREE) for e in experiments}) < len(experiments):
        raise UserError(f"two of the runs to train together are the same; change one's {' or '.join(FREE)}")


@dataclass(frozen=True)
class Together:
    """Programs on one mesh that ``check`` has passed. The state of all has a first axis for the members.

    at_once: vmap over members; otherwise they make their steps one after another, inside the program.
    """

    programs: tuple[Program, ...]
    at_once: bool

    @classmethod
    def of(cls, programs: Iterable[Program]) -> Together:
        """At once on one accelerator. Not on CPUs, whose batched products are slower than as many single ones
        (benchmarks/results/groups.json), nor on a mesh of several devices, where jax 0.10.2 cannot batch
        parameters whose gradients are reduced over it (its rule for concatenate reads ``spec[axis]``)."""
        programs = tuple(programs)
        layout = programs[0].layout
        return cls(programs, layout.platform != "cpu" and layout.mesh.size == 1)

    @property
    def shared(self) -> Program:
        """For what depends on neither seed nor rate: evaluation, samples, compiled once."""
        return self.programs[0]

    def describe(self) -> str:
        """One line: how many, how, and what each has for its own."""
        every = (program.experiment for program in self.programs)
        own = "; ".join(f"seed {e.seed}, rate {e.optimizer.learning_rate:g}" for e in every)
        how = "at once" if self.at_once else "one after another"
        return f"{len(self.programs)} runs as one program, their steps {how}: {own}"

    def init(self) -> list[State]:
        """Of every member its state at step 0, as it would be alone."""
        with jax.set_mesh(self.shared.layout.mesh):
            create = jax.jit(self.shared.create)
            return [create(jax.random.key(program.experiment.seed)) for program in self.programs]

    def stack(self, states: Sequence[State]) -> State:
        """One state of all members."""
        with jax.set_mesh(self.shared.layout.mesh):
            return jax.jit(_stack)(tuple(states))

    def take(self, states: State, member: int) -> State:
        """The state of one member, as it would be alone."""
        with jax.set_mesh(self.shared.layout.mesh):
            return jax.jit(_member)(states, member)

    def steps(self, states: State, batches: Sequence[Batch]) -> tuple[State, list[Metrics]]:
        """``steps_per_dispatch`` updates of every member on its own batch; of each its metrics [steps]. The
        states given are used up."""
        with jax.set_mesh(self.shared.layout.mesh):
            return self._steps(*self._free, states, tuple(batches))

    @cached_property
    def _free(self) -> tuple[jax.Array, jax.Array]:
        """Seeds and rates, [members] each."""
        every = [program.experiment for program in self.programs]
        seeds, rates = zip(*((e.seed, e.optimizer.learning_rate) for e in every), strict=True)
        return jnp.asarray(seeds, jnp.int32), jnp.asarray(rates, jnp.float32)

    @cached_property
    def _steps(self) -> Callable:
        def member(seed: jax.Array, rate: jax.Array, state: State, batch: Batch) -> tuple[State, Metrics]:
            e = self.shared.experiment
            optimizer = dataclasses.replace(e.optimizer, learning_rate=rate)
            traced = dataclasses.replace(e, seed=seed, optimizer=optimizer)
            program = dataclasses.replace(self.shared, experiment=traced)
            return step.make_steps(program.step_fn)(state, batch)

        def members(
            seeds: jax.Array, rates: jax.Array, states: State, batches: tuple[Batch, ...]
        ) -> tuple[State, list[Metrics]]:
            each = seeds, rates, states, _stack(batches)
            if self.at_once:
                states, metrics = jax.vmap(member)(*each)
            else:
                states, metrics = jax.lax.map(lambda one: member(*one), each)
            return states, [_member(metrics, i) for i in range(len(batches))]

        return jax.jit(members, donate_argnums=2)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _member(stacked: Any, index: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)
