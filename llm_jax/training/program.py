"""From an experiment to the compiled pieces of a run: model, batches, step, evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import mesh
from llm_jax.data import loader, packing
from llm_jax.data.batch import Batch
from llm_jax.data.source import TokenSource
from llm_jax.errors import UserError
from llm_jax.mesh import Layout
from llm_jax.models import transformer
from llm_jax.text import shards, tokenizers
from llm_jax.text.prepare import load_tokenizer, prepare
from llm_jax.training import evaluate, optimizers, step
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.experiment import Experiment, check_mesh, complete
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.state import State


@dataclass(frozen=True)
class Program:
    """Everything a loop, or a research script, needs. Pure functions; the state is the caller's."""

    experiment: Experiment  # complete
    layout: Layout
    directory: Path  # the shard set

    @classmethod
    def prepare(
        cls, experiment: Experiment, directory: str | Path, say: Callable[[str], None] = print
    ) -> Program:
        """Makes the shard set at ``directory`` if it is not there, starts jax, and builds."""
        header = prepare(experiment.data, experiment.tokenizer, Path(directory), say)
        return cls.build(complete(experiment, header["vocab_size"]), Path(directory))

    @classmethod
    def build(
        cls, experiment: Experiment, directory: Path, devices: list[jax.Device] | None = None
    ) -> Program:
        """experiment: complete but for what the hardware decides, which is decided here.

        Raises UserError when it does not fit the devices.
        """
        rows = math.gcd(experiment.micro_batch, experiment.evaluation_rows)
        chosen = mesh.start(experiment.mesh, rows)
        layout = mesh.make_layout(chosen, devices)
        model = experiment.model
        if model.dtype == "auto":
            model = dataclasses.replace(model, dtype=mesh.default_dtype())
        experiment = dataclasses.replace(experiment, mesh=chosen, model=model)
        check_mesh(experiment, layout.mesh.shape)
        return cls(experiment, layout, directory)

    @classmethod
    def restore(cls, workdir: str | Path) -> tuple[Program, State]:
        """A run's program on this machine's devices, with its newest checkpoint.

        Raises UserError when the directory holds no run or no checkpoint.
        """
        run = RunDirectory(Path(workdir))
        experiment = run.stored()
        checkpointer = Checkpointer(run.checkpoints, keep=1)
        steps = checkpointer.steps()
        if experiment is None or not steps:
            raise UserError(f"--workdir={workdir} holds no run with a checkpoint; train one first")
        program = cls.build(experiment, run.data_of(experiment))
        return program, checkpointer.restore(steps[-1], program.abstract_state())

    @cached_property
    def model(self) -> transformer.Transformer:
        return transformer.Transformer(self.experiment.model, self.layout)

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return load_tokenizer(self.directory)

    @cached_property
    def optimizer(self) -> optimizers.Optimizer:
        e = self.experiment
        schedule = e.schedule.build(e.optimizer.learning_rate, e.steps)
        return optimizers.build(e.optimizer, schedule)

    # ---- state --------------------------------------------------------------------------------

    def _create(self, key: jax.Array) -> State:
        params = transformer.init_params(self.model, key)
        return State.create(params, self.optimizer.transformation.init(params))

    def init(self) -> State:
        """The state at step 0: the same on any mesh."""
        with jax.set_mesh(self.layout.mesh):
            return jax.jit(self._create)(jax.random.key(self.experiment.seed))

    def abstract_state(self) -> State:
        """ShapeDtypeStructs of the state, with the shardings of this mesh."""

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
            sharding = NamedSharding(self.layout.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        with jax.set_mesh(self.layout.mesh):
            key = jax.eval_shape(lambda: jax.random.key(0))
            return jax.tree.map(place, jax.eval_shape(self._create, key))

    # ---- training -----------------------------------------------------------------------------

    @cached_property
    def step_fn(self) -> Callable:
        """(state, batch [accumulation, rows, length]) -> (state, metrics), not compiled."""
        return step.make_step(self.model, self.experiment.objective, self.optimizer, self.experiment.seed)

    @cached_property
    def _steps(self) -> Callable:
        return jax.jit(step.make_steps(self.step_fn), donate_argnums=0)

    def steps(self, state: State, batches: Batch) -> tuple[State, step.Metrics]:
        """``steps_per_dispatch`` updates; metrics are [steps]. The state given is used up."""
        with jax.set_mesh(self.layout.mesh):
            return self._steps(state, batches)

    @cached_property
    def batches(self) -> loader.TrainBatches:
        """``batches[i]`` is what dispatch ``i`` trains on."""
        e = self.experiment
        return loader.TrainBatches(
            rows=self.rows("train"),
            to_batch=self._to_batch(e.seed),
            seed=e.seed,
            shape=(e.steps_per_dispatch, e.accumulation, e.micro_batch),
            sharding=self.layout.named(None, None, "batch"),
        )

    def rows(self, split: str) -> packing.Packed | packing.OneDocument:
        data = self.experiment.data
        return packing.pack(TokenSource(self.directory, split), data.rows, data.sequence_length)

    def _to_batch(self, seed: int) -> loader.ToBatch:
        vocab_size = shards.read_header(self.directory)["vocab_size"]
        return partial(self.experiment.objective.to_batch, seed=seed, vocab_size=vocab_size)

    # ---- evaluation ---------------------------------------------------------------------------

    @cached_property
    def _evaluation(self) -> Callable:
        return jax.jit(evaluate.make_evaluation(self.model, self.experiment.objective))

    def evaluation_batches(self) -> Iterator[Batch]:
        e = self.experiment
        return loader.evaluation_batches(
            self.rows("validation"),
            self._to_batch(0),  # not the run's seed: every run is judged on the same masks
            e.evaluation_rows,
            self.layout.named(None, None, "batch"),
            e.evaluation.batches,
        )

    def evaluate(self, params: Any) -> dict[str, float]:
        """Means over the validation split."""
        with jax.set_mesh(self.layout.mesh):
            return evaluate.evaluate(self._evaluation, params, self.evaluation_batches())
