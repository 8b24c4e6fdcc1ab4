"""Cross-entropy over a large vocabulary, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llm_jax import hardware
from llm_jax.config import identity
from llm_jax.data.batch import Batch
from llm_jax.layout import platform_of
from llm_jax.models import look_up
from llm_jax.models.config import NEVER

# The most logits that a device holds at once: 256 MB in float32. Below it nothing is chunked.
MAX_LOGITS = 1 << 26
SHARE = 1 / 4  # of a GPU's memory that they may take instead: made once, not twice, 17% of GPT-2's step (log)
GROUP, MOST_GROUP = 128, 1024  # scores that a GPU puts together first: a multiple and the most
PADDING = 0.1 * NEVER  # logits below it are of entries that pad the vocabulary

LogitsFn = Callable[[jax.Array], jax.Array]
Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class PredictsTokens:
    """The losses of an objective whose targets are tokens.

    z_loss: coefficient of the mean of log(sum(exp(logits)))^2, which keeps logits from drifting (Chowdhery
    et al. 2022, PaLM, arXiv 2204.02311: 1e-4). label_smoothing: the share of a target's mass that is spread
    over the vocabulary (Szegedy et al. 2015, arXiv 1512.00567). Both act on what is trained; the reported
    "loss" is always the plain cross-entropy.

    ``sums`` are divided by ``weights``, taken over the whole global batch, so that micro-batches and devices
    never change the mean. Only names with a coefficient are trained on; the rest are reported.
    """

    z_loss: float = identity(0.0, neutral=0.0)
    label_smoothing: float = identity(0.0, neutral=0.0)

    @property
    def coefficients(self) -> dict[str, float]:
        trained = {"smoothed_loss": 1.0} if self.label_smoothing else {"loss": 1.0}
        return trained | ({"z_loss": self.z_loss} if self.z_loss else {})

    def targets_of_row(self, length: int) -> int:
        """The most targets that a row of ``length`` tokens can have."""
        return length

    def names(self, evaluating: bool = False) -> tuple[str, ...]:
        """What is summed: "loss" (nats), "accuracy" (right first guesses), what else is trained on, and in
        evaluation "top5_accuracy". A tie for the first place is right: in training on a GPU, where scores are
        rounded, there are some, and a little more is right than in evaluation."""
        extras = tuple(name for name in self.coefficients if name != "loss")
        return ("loss", "accuracy", *extras, *(("top5_accuracy",) if evaluating else ()))

    def weights(self, batch: Batch, evaluating: bool = False) -> Sums:
        """{name: total weight}, float32 scalars, of any number of batches."""
        return dict.fromkeys(self.names(evaluating), jnp.sum(batch.weights))

    def sums(self, logits_fn: LogitsFn, hidden: jax.Array, batch: Batch, evaluating: bool = False) -> Sums:
        """{name: sum}, float32 scalars."""
        targets, weights = batch.targets, batch.weights
        if batch.predict is not None:
            hidden, targets, weights = _at(batch.predict, hidden, targets, weights)
        extras = self.names(evaluating)[2:]
        return cross_entropy(
            logits_fn, hidden, targets, weights, extras=extras, smoothing=self.label_smoothing
        )


def cross_entropy(
    logits_fn: LogitsFn,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    max_logits: int = 0,
    extras: tuple[str, ...] = (),
    smoothing: float = 0.0,
) -> Sums:
    """Sums over tokens of weight * value, in float32, for the values "loss", -log p(target), and "accuracy".

    hidden: [batch, length, d]; targets: int [batch, length]; weights: float32 [batch, length];
    logits_fn: [batch, n, d] to float32 [batch, n, vocab]; extras: of "z_loss", "smoothed_loss" and
    "top5_accuracy". When the logits of the batch would be more than ``max_logits`` numbers on a device (0:
    ``most_logits``), they are made, used and made again in the backward pass, chunk of the length after
    chunk. Where the length is cut, every chunk takes as much of each shard.
    """
    logits = jax.eval_shape(logits_fn, hidden)
    most = max_logits or most_logits(logits.sharding.mesh)
    count = _chunks(*logits.sharding.shard_shape(logits.shape), most)
    by_token = PartitionSpec(*jax.typeof(hidden).sharding.spec.partitions[:2])
    targets, weights = (jax.sharding.reshard(x, by_token) for x in (targets, weights))

    def chunk_sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        values = _values(logits_fn(hidden), targets, extras, smoothing)
        return {name: jnp.sum(x * weights) for name, x in values.items()}

    if count == 1:
        return chunk_sums(hidden, targets, weights)

    def body(total: Sums, chunk: tuple) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(chunk_sums)(*chunk)), None

    chunks = tuple(_split_length(x, count) for x in (hidden, targets, weights))
    zeros = {name: jnp.zeros((), jnp.float32) for name in ("loss", "accuracy", *extras)}
    return jax.lax.scan(body, zeros, chunks)[0]


def most_logits(mesh: Mesh | AbstractMesh) -> int:
    """How many logits, of four bytes, a device of a mesh holds at once: by its chip, so that all hosts of a
    run compile the same."""
    device = mesh.abstract_mesh.abstract_device
    chip = hardware.lookup(device.device_kind) if device and device.platform == "gpu" else None
    return int(SHARE * chip.memory) // 4 if chip else MAX_LOGITS


def _at(
    places: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, ...]:
    """hidden, targets and weights at ``places`` [batch, k]. Where the length is cut it is made whole for it,
    and the places are shared as it was, filled up to a multiple with some of weight 0."""
    spec = jax.typeof(hidden).sharding.spec
    missing = -places.shape[1] % _ways(hidden)
    hidden = jax.sharding.reshard(hidden, PartitionSpec(spec.partitions[0]))
    hidden = look_up.places_of(hidden, places)
    targets, weights = (jnp.take_along_axis(x, places, axis=1) for x in (targets, weights))
    if missing:
        hidden, targets, weights = (
            jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) for x in (hidden, targets, weights)
        )
    return jax.sharding.reshard(hidden, spec), targets, weights


def _ways(x: jax.Array) -> int:
    """Into how many shards the length of [batch, length, ...] is cut."""
    return x.shape[1] // jax.typeof(x).sharding.shard_shape(x.shape)[1]


def _values(logits: jax.Array, targets: jax.Array, extras: tuple[str, ...], smoothing: float) -> Sums:
    """{name: float32 [batch, n]} of each token."""
    top = jax.lax.stop_gradient(_reduce(jnp.max, logits))
    log_total = jnp.log(_reduce(jnp.sum, jnp.exp(logits - top[..., None]))) + top
    label = _of_target(logits, targets)
    values = {"loss": log_total - label, "accuracy": (label >= top).astype(jnp.float32)}
    if "z_loss" in extras:
        values["z_loss"] = jnp.square(log_total)
    if "top5_accuracy" in extras:
        better = jnp.sum(logits > label[..., None], axis=-1)
        values["top5_accuracy"] = (better < 5).astype(jnp.float32)
    if "smoothed_loss" in extras:
        real = logits > PADDING
        mean = jnp.sum(jnp.where(real, logits, 0.0), axis=-1) / jnp.sum(real, axis=-1)
        values["smoothed_loss"] = log_total - (1 - smoothing) * label - smoothing * mean
    return values


def _reduce(how: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """how(x, axis=-1) of [..., vocab]. On a GPU by groups first: XLA's own of 50,304 scores are of 393, which
    it reads by two bytes in place of eight (log)."""
    count = x.shape[-1]
    fitting = [n for n in range(GROUP, MOST_GROUP + 1, GROUP) if count % n == 0 and n < count]
    if fitting and platform_of(x) == "gpu" and _cut(x)[-1] is None:
        groups = jnp.reshape(x, (*x.shape[:-1], -1, fitting[-1]))
        x = _barrier(how(groups, axis=-1))
    return how(x, axis=-1)


@jax.custom_vjp
def _barrier(x: jax.Array) -> jax.Array:
    """A barrier, and none for the gradient."""
    return jax.lax.optimization_barrier(x)


_barrier.defvjp(lambda x: (_barrier(x), None), lambda _, d_x: (d_x,))


@jax.custom_vjp
def _of_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [batch, n]: each token's logit of its target. Where the vocabulary is whole it is looked up,
    which spares a pass over the logits; the gradient is a mask either way, which is fused with the others',
    while that of a look-up would be scattered."""
    if _cut(logits)[-1] is not None:
        return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _of_target_forward(logits: jax.Array, targets: jax.Array) -> tuple:
    return _of_target(logits, targets), (logits, targets)


def _of_target_backward(kept: tuple, d_label: jax.Array) -> tuple:
    return jnp.where(_is_target(*kept), d_label[..., None], 0.0), None


_of_target.defvjp(_of_target_forward, _of_target_backward)


def _cut(logits: jax.Array) -> PartitionSpec:
    return jax.typeof(logits).sharding.spec


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    entries = jnp.arange(logits.shape[-1])
    return targets[..., None] == jax.sharding.reshard(entries, PartitionSpec(_cut(logits)[-1]))


def _chunks(batch: int, length: int, vocab: int, max_logits: int) -> int:
    """The fewest equal chunks of a device's length whose logits are few enough; else one token each."""
    fitting = (n for n in range(1, length) if length % n == 0 and batch * length // n * vocab <= max_logits)
    return next(fitting, length)


def _split_length(x: jax.Array, count: int) -> jax.Array:
    """[batch, length, ...] to [count, batch, length / count, ...], an equal part of each shard in each."""
    batch, length, *rest = x.shape
    ways, spec = _ways(x), jax.typeof(x).sharding.spec
    rows, cut, *others = spec.partitions
    parts = PartitionSpec(rows, cut, None, None, *others, reduced=spec.reduced)
    x = jnp.reshape(x, (batch, ways, count, length // ways // count, *rest), out_sharding=parts)
    x = jnp.moveaxis(x, 2, 0)
    chunks = PartitionSpec(None, rows, cut, *others, reduced=spec.reduced)
    return jnp.reshape(x, (count, batch, length // count, *rest), out_sharding=chunks)
