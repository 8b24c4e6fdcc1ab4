"""From an experiment to the compiled pieces of a run: model, batches, step, evaluation."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import flags, mesh, storage
from llm_jax.data import loader, packing
from llm_jax.data.batch import Batch
from llm_jax.data.splits import Splits
from llm_jax.errors import UserError
from llm_jax.layout import Layout, abstractly
from llm_jax.models import attention, transformer
from llm_jax.text import shards, tokenizers
from llm_jax.text.prepare import load_tokenizer, prepare, prepare_set
from llm_jax.text.shards import VALIDATION
from llm_jax.text.sources import SetConfig
from llm_jax.text.words import Vocabulary
from llm_jax.training import evaluate, optimizers, step
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.experiment import Experiment, complete
from llm_jax.training.fitting import check_mesh
from llm_jax.training.progress import say
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
        sets = experiment.evaluation.sets
        header = prepare(experiment.data, experiment.tokenizer, storage.path(directory), say, sets)
        return cls.build(complete(experiment, header["vocab_size"]), storage.path(directory))

    @classmethod
    def build(
        cls, experiment: Experiment, directory: Path, devices: list[jax.Device] | None = None
    ) -> Program:
        """experiment: complete but for what the hardware decides, which is decided here.

        Raises UserError when it does not fit the devices, or its steps the epochs that its sources allow.
        """
        rows = math.gcd(experiment.micro_batch, experiment.evaluation_rows)
        chosen = mesh.start(experiment.mesh, rows)
        layout = mesh.make_layout(chosen, devices)
        model = experiment.model
        if model.dtype == "auto":
            model = dataclasses.replace(model, dtype=mesh.default_dtype())
        accumulation = experiment.accumulation or 1  # 0: planning/fit.py chooses it, where a run asks it
        experiment = dataclasses.replace(experiment, mesh=chosen, model=model, accumulation=accumulation)
        check_mesh(experiment, layout.mesh.shape)
        program = cls(experiment, layout, directory)
        program.splits.check_epochs(experiment.steps, experiment.global_batch_size)
        return program

    @classmethod
    def restore(cls, workdir: str | Path) -> tuple[Program, State]:
        """A run's program with its newest checkpoint, to be read: on this machine's devices, along which it
        is cut otherwise where the run's mesh does not fit.

        Raises UserError when the directory holds no run or no checkpoint.
        """
        run = RunDirectory(storage.path(workdir))
        experiment = run.stored()
        checkpointer = Checkpointer(run.checkpoints, keep=1)
        newest = checkpointer.newest()
        if experiment is None or newest is None:
            raise UserError(f"--workdir={workdir} holds no run with a checkpoint; train one first")
        directory = run.data_of(experiment)
        run.check_data(shards.content_id(shards.read_header(directory)))
        try:
            program = cls.build(experiment, directory)
        except UserError as error:
            devices = _that_fit(experiment)
            program = cls.build(_cut(experiment, len(devices)), directory, devices)
            say(f"{error}; read with mesh.fsdp={len(devices)}")
        return program, program.read(checkpointer, newest)

    @cached_property
    def model(self) -> transformer.Transformer:
        config, one_segment = self.experiment.model, self.experiment.data.rows != "packed"
        kernel = attention.choose_kernel(config, self.layout, one_segment)
        return transformer.Transformer(dataclasses.replace(config, kernel=kernel), self.layout)

    @property
    def unpadded(self) -> bool:
        """Whether training rows are one segment each with no padding, in an encoder: there it takes time."""
        return not self.experiment.model.causal and self.experiment.data.rows in packing.WHOLE

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return load_tokenizer(self.directory)

    @cached_property
    def optimizer(self) -> optimizers.Optimizer:
        e = self.experiment
        schedule = e.schedule.build(e.optimizer.learning_rate, e.steps)
        return optimizers.build(e.optimizer, schedule)

    # ---- state --------------------------------------------------------------------------------

    def _begin(self, params: Any) -> State:
        e, opt_state = self.experiment, self.optimizer.transformation.init(params)
        scale = e.loss_scale.create() if e.model.dtype == "float16" else None
        return State.create(params, opt_state, e.guard.create(), e.ema_decay > 0.0, scale)

    def create(self, key: jax.Array) -> State:
        """The state at step 0 from the key of a seed, not compiled."""
        return self._begin(transformer.init_params(self.model, key))

    def init(self) -> State:
        """The state at step 0: the same on any mesh."""
        with jax.set_mesh(self.layout.mesh):
            return jax.jit(self.create)(jax.random.key(self.experiment.seed))

    def fresh_params(self) -> Any:
        """The parameters of ``init``."""
        with jax.set_mesh(self.layout.mesh):
            create = jax.jit(partial(transformer.init_params, self.model))
            return create(jax.random.key(self.experiment.seed))

    def begin(self, params: Any) -> State:
        """The state at step 0 with the given parameters."""
        with jax.set_mesh(self.layout.mesh):
            return jax.jit(self._begin)(params)

    def abstract_state(self) -> State:
        """ShapeDtypeStructs of the state, with the shardings of this mesh."""

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
            sharding = NamedSharding(self.layout.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        with abstractly(self.layout.mesh):
            key = jax.eval_shape(lambda: jax.random.key(0))
            return jax.tree.map(place, jax.eval_shape(self.create, key))

    def read(self, checkpointer: Checkpointer, step: int) -> State:
        """The state saved at ``step``. What is no matter of the numbers may differ: the loss scale, which
        float16 alone has, and the guard, which older versions had not, begin anew or are left behind."""
        e, target, everywhere = (
            self.experiment,
            self.abstract_state(),
            NamedSharding(self.layout.mesh, PartitionSpec()),
        )
        fresh = {"guard": e.guard.create(), "loss_scale": e.loss_scale.create()}
        names = checkpointer.arrays(step)
        there = {part: any(name.startswith(f"{part}/") for name in names) for part in fresh}

        def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

        saved = {part: jax.tree.map(abstract, x) if there[part] else None for part, x in fresh.items()}
        state = checkpointer.restore(step, target.replace(**saved))
        for part, x in fresh.items():
            if getattr(target, part) is None:
                state = state.replace(**{part: None})
            elif not there[part]:
                state = state.replace(**{part: jax.device_put(x, everywhere)})
        return state

    # ---- training -----------------------------------------------------------------------------

    @cached_property
    def step_fn(self) -> Callable:
        """(state, batch [accumulation, rows, length]) -> (state, metrics), not compiled."""
        e = self.experiment
        return step.make_step(
            self.model.clone(unpadded=self.unpadded),
            e.objective,
            self.optimizer,
            e.seed,
            e.ema_decay,
            e.loss_scale,
            e.guard,
        )

    @cached_property
    def _steps(self) -> Callable:
        steps = step.make_steps(self.step_fn)
        return jax.jit(steps, donate_argnums=0, compiler_options=self.compiler_options)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """What XLA is told of the training step alone, where it was measured: BERT's kind on one GPU."""
        one_gpu = self.layout.platform == "gpu" and self.layout.mesh.size == 1
        c = self.experiment.model
        return flags.BLOCKS if one_gpu and c.activation == "gelu" and not c.causal else None

    def steps(self, state: State, batches: Batch) -> tuple[State, step.Metrics]:
        """``steps_per_dispatch`` updates; metrics are [steps]. The state given is used up."""
        with jax.set_mesh(self.layout.mesh):
            return self._steps(state, batches)

    def lower(self, state: State, batches: Batch) -> jax.stages.Lowered:
        """``steps`` for these shapes and shardings, to be compiled and not run."""
        with jax.set_mesh(self.layout.mesh):
            return self._steps.lower(state, batches)

    @cached_property
    def batches(self) -> loader.TrainBatches:
        """``batches[i]`` is what dispatch ``i`` trains on."""
        e = self.experiment
        return loader.TrainBatches(
            rows=self.splits.training,
            to_batch=self._to_batch(e.seed),
            seed=e.seed,
            shape=(e.steps_per_dispatch, e.accumulation, e.micro_batch),
            sharding=self.layout.named(None, None, "batch"),
        )

    @cached_property
    def splits(self) -> Splits:
        """Rows of any split of the shard set."""
        return Splits(self.directory, self.experiment.data, filled=self.unpadded)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer)

    def _to_batch(self, seed: int) -> loader.ToBatch:
        return partial(self.experiment.objective.to_batch, seed=seed, vocabulary=self._vocabulary)

    # ---- evaluation ---------------------------------------------------------------------------

    @cached_property
    def _evaluation(self) -> Callable:
        return jax.jit(evaluate.make_evaluation(self.model, self.experiment.objective))

    def evaluation_batches(self, split: str = VALIDATION) -> Iterator[Batch]:
        e = self.experiment
        return loader.evaluation_batches(
            self.splits.rows(split),
            self._to_batch(0),  # not the run's seed: every run is judged on the same masks
            e.evaluation_rows,
            self.layout.named(None, None, "batch"),
            e.evaluation.batches,
        )

    def evaluate(self, params: Any) -> dict[str, float]:
        """Means over the validation set: of several sources, each counts by its weight in training."""
        return self.evaluate_set(params, VALIDATION)

    def evaluate_set(self, params: Any, name: str) -> dict[str, float]:
        """Means over the validation set or one split: "validation", "validation.SOURCE", "test.SET"."""
        weights = self.splits.validation if name == VALIDATION else {name: 1.0}
        return self._weigh({split: self._evaluate_split(params, split) for split in weights})

    def evaluate_all(self, params: Any) -> dict[str, dict[str, float]]:
        """{set: means}: "validation", each source's part of it where there are several, and every set
        that the config names."""
        parts = {split: self._evaluate_split(params, split) for split in self.splits.validation}
        names = [shards.split_name(shards.TEST, entry.name) for entry in self.experiment.evaluation.sets]
        sets = {name: self._evaluate_split(params, name) for name in names}
        return {VALIDATION: self._weigh(parts), **(parts if len(parts) > 1 else {}), **sets}

    def evaluate_text(self, params: Any, text: tuple[str, ...]) -> dict[str, float]:
        """Means over any text, all of it: files, directories, globs. Raises UserError for bad text."""
        entry = SetConfig("text", text)
        with tempfile.TemporaryDirectory() as directory:
            data = self.experiment.data
            prepare_set(data, self.tokenizer, entry, Path(directory), say=lambda _: None)
            other = dataclasses.replace(self, directory=Path(directory))
            return other.evaluate_set(params, shards.split_name(shards.TEST, entry.name))

    def _evaluate_split(self, params: Any, split: str) -> dict[str, float]:
        with jax.set_mesh(self.layout.mesh):
            batches = self.evaluation_batches(split)
            return evaluate.evaluate(self._evaluation, params, batches, self._bytes_per_target(split))

    def _bytes_per_target(self, split: str) -> float | None:
        """None for an encoder, which gives no probability to a text."""
        return self.splits.bytes_per_target(split) if self.experiment.model.causal else None

    def _weigh(self, parts: dict[str, dict[str, float]]) -> dict[str, float]:
        return evaluate.weigh(parts, self.splits.validation, {s: self._bytes_per_target(s) for s in parts})


def _that_fit(e: Experiment) -> list[jax.Device]:
    """The most devices along which parameters and rows of any run can be cut."""
    devices, least = jax.devices(), math.gcd(e.model.model_dim, e.micro_batch, e.evaluation_rows)
    return devices[: max(n for n in range(1, len(devices) + 1) if least % n == 0)]


def _cut(e: Experiment, devices: int) -> Experiment:
    return dataclasses.replace(e, mesh=mesh.MeshConfig(fsdp=devices, cpu_devices=e.mesh.cpu_devices))
