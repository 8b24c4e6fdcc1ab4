"""The schema of an experiment: every section of a config, and what must hold between them.

A config file is ``get_config(arg="") -> ConfigDict``, built from ``default_config`` and edited.
``resolve`` turns it, once, into frozen dataclasses and checks all that can be checked before a device
is touched; below it nothing sees a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections

from llm_jax import config as configs
from llm_jax.config import choice, identity, part, runtime
from llm_jax.data.packing import PACKINGS
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig
from llm_jax.models import flops, moe
from llm_jax.models.activations import ACTIVATIONS
from llm_jax.models.attention import KERNELS
from llm_jax.models.blocks import BLOCKS
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import NORMS
from llm_jax.models.positions import POSITIONS
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM, UNITS
from llm_jax.text import sources
from llm_jax.text.sources import CUTS, DataConfig, SetConfig
from llm_jax.text.tokenizers import MASK_TEXT, TOKENIZERS, SentencePieceConfig
from llm_jax.training import optimizers
from llm_jax.training.guard import GuardConfig
from llm_jax.training.loss_scale import LossScaleConfig
from llm_jax.training.optimizers import OPTIMIZERS
from llm_jax.training.schedules import SCHEDULES, Schedule

OBJECTIVES = {"clm": CLM, "mlm": MLM}
INIT_VOCABULARY = ("error", "mean", "fresh")
# Fields of any section. A share that is left out, or of what was that is kept: less than 1.
LEFT_OR_KEPT = ("dropout", "stochastic_depth", "label_smoothing", "beta1", "beta2", "momentum", "ema_decay")
NOT_NEGATIVE = (
    *("every", "every_minutes", "keep_best", "keep_every", "batches", "batch_size"),
    *("count", "tokens", "temperature", "learning_rate", "weight_decay", "clip_norm", "z_loss"),
    *("num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_length"),
    *("logit_softcap", "attention_softcap"),
)


@dataclass(frozen=True)
class EvaluationConfig:
    """every: steps between evaluations, 0 = only at the end; batches: of each set, 0 = all; batch_size:
    0 = rows of a micro-batch; sets: named texts to be judged on beside the validation splits; patience: after
    so many evaluations without a better validation loss the run ends, 0 = never."""

    every: int = runtime(0)
    batches: int = runtime(0)
    batch_size: int = runtime(0)
    sets: tuple[SetConfig, ...] = runtime(())
    patience: int = runtime(0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which of what was saved stays. The end is always saved.

    every: steps between checkpoints, every_minutes: minutes between them (taken between dispatches); 0 =
    never. keep: the newest, at least 1. keep_best: so many of lowest validation loss; an evaluation that is
    one of them is saved at once. keep_every: multiples of so many steps are saved and kept for ever. at: so
    are these steps, from which other runs go on (a sweep sets it).

    verify: "all" = every byte is hashed before it is restored, or "off". damaged: what to do where the newest
    checkpoint is not what was written: "stop", or "skip" = set it aside and go on from the one before.
    """

    every: int = runtime(0)
    every_minutes: float = runtime(0.0)
    keep: int = runtime(2)
    keep_best: int = runtime(0)
    keep_every: int = runtime(0)
    at: tuple[int, ...] = runtime(())
    verify: str = runtime("all")
    damaged: str = runtime("stop")


@dataclass(frozen=True)
class SampleConfig:
    """What is written to samples.txt: ``count`` continuations of ``prompt``, ``tokens`` long; 0 = nothing.
    For an encoder the prompt holds blanks, written <mask>; without one nothing is written. every: steps
    between samples, 0 = only at the end."""

    prompt: str = runtime("")
    count: int = runtime(2)
    tokens: int = runtime(100)
    temperature: float = runtime(0.8)
    every: int = runtime(0)


@dataclass(frozen=True)
class LoggingConfig:
    """Beside metrics/: tensorboard: event files in the run directory; wandb_project: "" = no W&B.
    profile: "START:STOP", steps that jax.profiler traces into profile/."""

    tensorboard: bool = runtime(False)
    wandb_project: str = runtime("")
    profile: str = runtime("")

    @property
    def profiled(self) -> tuple[int, int]:
        """(first step, step to stop before); (0, 0) for none. Raises UserError for anything else."""
        start, colon, stop = self.profile.partition(":")
        if not self.profile:
            return 0, 0
        if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise UserError(f"config.logging.profile={self.profile!r}: write START:STOP in steps, like 20:30")
        return int(start), int(stop)


@dataclass(frozen=True)
class Experiment:
    """Everything about a run. accumulation: micro-batches of a step; 0 = as few as the devices' free memory
    allows, with blocks recomputed where it must be, chosen at the first start of scripts/train.py (what plans
    or builds a program by itself takes 0 as 1). steps_per_dispatch: steps that the device makes without the
    host; cadences are multiples of it. expected_loss: the range in which the final validation loss should
    fall, printed beside it; () = unknown. ema_decay: of the running mean of the parameters, which is then
    what is evaluated, sampled and shipped; 0 = none.

    init_from: a run or a checkpoint directory whose parameters this run begins with; its optimiser and its
    step are not taken, and a run that goes on does not look at it. init_skip: expressions over parameter
    names; those keep their fresh values. init_vocabulary: what the rows of tokens that the old vocabulary
    has not are: "error", "mean" of the old rows with a little noise, or "fresh".
    """

    seed: int = identity(0)
    steps: int = identity(100)
    global_batch_size: int = identity(8)
    accumulation: int = runtime(1)
    steps_per_dispatch: int = runtime(1)
    expected_loss: tuple[float, ...] = runtime(())
    ema_decay: float = identity(0.0, neutral=0.0)
    init_from: str = runtime("")
    init_skip: tuple[str, ...] = identity((), neutral=())
    init_vocabulary: str = identity("error", neutral="error")
    data: DataConfig = part(DataConfig)
    tokenizer: Any = choice(TOKENIZERS, "char")
    model: ModelConfig = part(ModelConfig)
    objective: Any = choice(OBJECTIVES, "clm")
    optimizer: optimizers.Section = choice(OPTIMIZERS, "adamw")
    schedule: Schedule = choice(SCHEDULES, "cosine")
    loss_scale: LossScaleConfig = part(LossScaleConfig)
    guard: GuardConfig = part(GuardConfig)
    mesh: MeshConfig = part(MeshConfig)
    evaluation: EvaluationConfig = part(EvaluationConfig)
    checkpoint: CheckpointConfig = part(CheckpointConfig)
    samples: SampleConfig = part(SampleConfig)
    logging: LoggingConfig = part(LoggingConfig)

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass, over all devices."""
        return self.global_batch_size // (self.accumulation or 1)

    @property
    def scored(self) -> float:
        """The share of a row's places that the head scores in training: of an encoder those with targets."""
        length = self.data.sequence_length
        return self.objective.targets_of_row(length) / length

    def flops_per_token(self, causal: bool = False) -> float:
        """Training FLOPs of a place of a row, ``flops.training_flops_per_token``."""
        return flops.training_flops_per_token(self.model, self.data.sequence_length, causal, self.scored)

    @property
    def evaluation_rows(self) -> int:
        return self.evaluation.batch_size or self.micro_batch


def default_config(**components: str) -> ml_collections.ConfigDict:
    """The default config, locked; components picks others by name: ``objective="mlm"``."""
    config = configs.to_config_dict(Experiment())
    names = {f"{section}.{configs.NAME}": name for section, name in components.items()}
    return configs.override(Experiment, config, names)


def override(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy with dotted keys changed; strings are read as the type of the field."""
    return configs.override(Experiment, config, changes)


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any], find_text: bool = True) -> Experiment:
    """The checked Experiment of a config. Raises UserError with what is wrong, where, and the mend.

    find_text: also that its text is there, which a run that has begun needs no more.
    """
    experiment = configs.from_dict(Experiment, config)
    check_values(experiment)
    check_model(experiment)
    check_samples(experiment.samples, experiment.model.causal)
    check_cadences(experiment)
    sources.check(experiment.data, experiment.evaluation.sets)
    if find_text:
        sources.find(experiment.data, experiment.evaluation.sets)
    return experiment


def complete(experiment: Experiment, vocab_size: int) -> Experiment:
    """The experiment with what the data decide: vocabulary and length of the position table."""
    model = experiment.model
    wanted = model.vocab_size or vocab_size
    if wanted < vocab_size:
        raise UserError(
            f"config.model.vocab_size={wanted} is smaller than the tokenizer's {vocab_size}; "
            "raise it, or leave it 0 to take the tokenizer's"
        )
    length = model.max_length or experiment.data.sequence_length
    model = dataclasses.replace(model, vocab_size=wanted, max_length=length)
    return dataclasses.replace(experiment, model=model)


# ---- checks ---------------------------------------------------------------------------------


def check_values(e: Experiment) -> None:
    """Single values: positive sizes, known names, shares between 0 and 1."""
    positive = ("steps", "global_batch_size", "steps_per_dispatch")
    sections = {
        "data": ("sequence_length",),
        "model": ("num_layers", "model_dim", "num_heads"),
        "checkpoint": ("keep",),
    }
    keys = [*positive, *(f"{s}.{key}" for s, keys in sections.items() for key in keys)]
    values = dict(configs.leaves(e))
    for key in keys:
        if values[key] < 1:
            raise UserError(f"config.{key} must be at least 1, not {values[key]}")
    if not 0 <= e.seed < 2**31:
        raise UserError(f"config.seed must be at least 0 and less than 2^31, not {e.seed}")
    for key, value in values.items():
        name = key.rpartition(".")[2]
        if name in LEFT_OR_KEPT and not 0.0 <= value < 1.0:
            raise UserError(f"config.{key} must be at least 0 and less than 1, not {value}")
        if name in NOT_NEGATIVE and value < 0:
            raise UserError(f"config.{key} must be at least 0, not {value}")
    if e.evaluation.patience < 0 or (e.evaluation.patience and not e.evaluation.every):
        raise UserError(
            f"config.evaluation.patience={e.evaluation.patience} counts evaluations: it is at least 0 and "
            "needs evaluation.every"
        )
    e.guard.check()
    optimizers.check(e.optimizer)
    if not e.init_from and (e.init_skip or e.init_vocabulary != "error"):
        raise UserError("config.init_skip and init_vocabulary say how to begin from config.init_from; set it")
    names = {
        "objective.unit": UNITS,
        "data.validation": CUTS,
        "data.rows": PACKINGS,
        "model.positions": POSITIONS,
        "model.norm": NORMS,
        "model.activation": ACTIVATIONS,
        "model.block": BLOCKS,
        "model.kernel": KERNELS,
        "model.dtype": ("auto", "float32", "bfloat16", "float16"),
        "init_vocabulary": INIT_VOCABULARY,
        "checkpoint.verify": ("all", "off"),
        "checkpoint.damaged": ("stop", "skip"),
    }
    for key, known in names.items():
        if key in values and values[key] not in known:
            raise UserError(f"config.{key} is {values[key]!r}; choose one of {', '.join(known)}")
    shares = [k for k in values if k.endswith(("_fraction", "_rate", "_share"))]
    for key in shares:
        if key != "optimizer.learning_rate" and not 0.0 <= values[key] <= 1.0:
            raise UserError(f"config.{key} must lie between 0 and 1, not {values[key]}")
    replaced = sum(values.get(f"objective.{key}", 0.0) for key in ("mask_share", "random_share"))
    if replaced > 1.0:
        raise UserError(
            f"config.objective: mask_share and random_share are {replaced:g} together, more than 1"
        )
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key} is {value}; give a finite number")


def check_samples(config: SampleConfig, causal: bool) -> None:
    """The prompt of an encoder has blanks, or is empty, for no samples; a decoder's has none."""
    if causal and MASK_TEXT in config.prompt:
        raise UserError(
            f"config.samples.prompt has {MASK_TEXT}, but this model is a decoder and only writes on"
        )
    if not causal and config.prompt and MASK_TEXT not in config.prompt:
        raise UserError(
            f"config.samples.prompt has no blank; write {MASK_TEXT} where to fill in, or leave it empty"
        )


def check_model(e: Experiment) -> None:
    """Shapes that must divide, and the model against the objective and the tokenizer."""
    m = e.model
    if not m.window or min(m.window) < 0:
        raise UserError(f"config.model.window={m.window} must be one or more sizes, 0 = everywhere")
    if m.positions == "sinusoidal" and m.model_dim % 2:
        raise UserError(f"config.model.model_dim={m.model_dim} must be even for sinusoidal positions")
    if not m.head_dim and m.model_dim % m.num_heads:
        raise UserError(
            f"config.model.model_dim={m.model_dim} is not divisible by num_heads={m.num_heads}; "
            "change one, or set head_dim"
        )
    if m.num_heads % m.kv_heads:
        raise UserError(f"config.model.num_heads={m.num_heads} is not divisible by num_kv_heads={m.kv_heads}")
    if m.positions == "rotary" and m.head_size % 2:
        raise UserError(f"config.model: rotary positions need an even head_dim, not {m.head_size}")
    if m.positions == "learnt" and 0 < m.max_length < e.data.sequence_length:
        raise UserError(
            f"config.model.max_length={m.max_length} is less than "
            f"data.sequence_length={e.data.sequence_length}"
        )
    moe.check(m, e.data.sequence_length)
    if m.causal != e.objective.causal:
        name = next(n for n, o in OBJECTIVES.items() if isinstance(e.objective, o))
        raise UserError(f"config.model.causal={m.causal}: {name} needs {e.objective.causal}")
    if m.fp8 and (m.dtype == "float16" or m.num_experts):
        raise UserError("config.model.fp8 goes with bfloat16 or float32, and without experts; turn it off")
    if isinstance(e.tokenizer, SentencePieceConfig) and 0 < m.vocab_size < e.tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size={m.vocab_size} is smaller than "
            f"tokenizer.vocab_size={e.tokenizer.vocab_size}; raise it, or leave it 0"
        )


def check_cadences(e: Experiment) -> None:
    """Batches that divide, cadences that fall between dispatches, a warm-up that ends."""
    e.schedule.check(e.steps)
    if e.accumulation < 0:
        raise UserError(f"config.accumulation must be at least 1, or 0 to be chosen, not {e.accumulation}")
    if e.accumulation == 0 and e.evaluation.batches and not e.evaluation.batch_size:
        raise UserError(
            "config.evaluation.batches counts batches, whose size accumulation=0 leaves to the memory of the "
            "devices; set evaluation.batch_size"
        )
    if e.accumulation and e.global_batch_size % e.accumulation:
        raise UserError(
            f"config.global_batch_size={e.global_batch_size} is not divisible by "
            f"accumulation={e.accumulation}"
        )
    cadences = {
        "steps": e.steps,
        "evaluation.every": e.evaluation.every,
        "checkpoint.every": e.checkpoint.every,
        "checkpoint.keep_every": e.checkpoint.keep_every,
        **{f"checkpoint.at[{i}]": step for i, step in enumerate(e.checkpoint.at)},
        "samples.every": e.samples.every,
        "logging.profile (start)": e.logging.profiled[0],
        "logging.profile (stop)": e.logging.profiled[1],
    }
    for key, value in cadences.items():
        if value % e.steps_per_dispatch:
            raise UserError(
                f"config.{key}={value} is not a multiple of "
                f"steps_per_dispatch={e.steps_per_dispatch}; change one"
            )
