"""What a model writes, as text: continuations of a prompt, or its blanks filled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import hosts
from llm_jax.errors import UserError
from llm_jax.inference.generate import fill_blanks, generate
from llm_jax.inference.sampling import Sampling
from llm_jax.storage import write_text
from llm_jax.text.tokenizers import BOS, MASK, MASK_TEXT, Tokenizer
from llm_jax.training.experiment import SampleConfig
from llm_jax.training.program import Program

HEADER = re.compile(r"^=== step (\d+) ===\n", re.MULTILINE)


class SampleFile:
    """samples.txt: a section a step, in order, however often a run was stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[int, str]:
        """{step: text}."""
        if not self._path.exists():
            return {}
        _, *parts = HEADER.split(self._path.read_bytes().decode())  # a model may write \r, too
        return {int(step): text for step, text in zip(parts[::2], parts[1::2], strict=True)}

    def add(self, step: int, text: str) -> None:
        """Puts ``text`` in the place of what stood there for this step, and leaves out what is later: an
        earlier attempt that came further wrote it. The file is replaced as a whole, by process 0."""
        if not hosts.leads():
            return
        text = HEADER.sub(lambda header: " " + header.group(), text)  # a model may write anything
        sections = {**{s: t for s, t in self.read().items() if s < step}, step: text}
        write_text(self._path, "".join(f"=== step {s} ===\n{t}" for s, t in sections.items()))


def check_prompt(program: Program) -> None:
    """Raises UserError for more tokens than an encoder reads, before the run at whose end they are read."""
    e = program.experiment
    if e.samples.count and not e.model.causal:
        _fitting(program, e.samples.prompt)


def sample_text(program: Program, params: Any) -> str:
    """What the model writes after ``samples.prompt``, or where it has blanks, as text; "" for no samples."""
    config = program.experiment.samples
    causal = program.experiment.model.causal
    if config.count == 0 or not (causal or config.prompt):
        return ""
    if causal:
        return continuations(program, params, config, Sampling(config.temperature))
    return filled(program, params, config.prompt, best=3)


def continuations(
    program: Program, params: Any, config: SampleConfig, sampling: Sampling, seed: int = 0
) -> str:
    """``config.count`` continuations, one under the other."""
    e = program.experiment
    if MASK_TEXT in config.prompt:
        raise UserError(f"the prompt has {MASK_TEXT}, but this model is a decoder and only writes on")
    prompt = encode_prompt(program.tokenizer, config.prompt, e.data.markers)
    if len(prompt) == 0:
        prompt = encode_prompt(program.tokenizer, "\n", e.data.markers)
    out = generate(
        program.model,
        params,
        prompt,
        tokens=config.tokens,
        count=config.count,
        length=e.data.sequence_length,
        seed=seed,
        sampling=sampling,
    )
    texts = [config.prompt + program.tokenizer.decode(ids) for ids in out]
    return "\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1)) + "\n"


def filled(program: Program, params: Any, prompt: str, best: int) -> str:
    """The prompt with its blanks filled, and the ``best`` guesses for each."""
    ids = _fitting(program, prompt)
    blanks = np.flatnonzero(ids == MASK)
    if len(blanks) == 0:
        raise UserError(f"the prompt {prompt!r} has no blank; write {MASK_TEXT} where to fill in")
    guesses, probabilities = fill_blanks(program.model, params, ids, best)
    whole = ids.copy()
    whole[blanks] = guesses[:, 0]
    lines = [prompt, program.tokenizer.decode(whole)]
    for number, (row, shares) in enumerate(zip(guesses, probabilities, strict=True), 1):
        listed = ", ".join(
            f"{program.tokenizer.decode([i])!r} {share:.2f}" for i, share in zip(row, shares, strict=True)
        )
        lines.append(f"blank {number}: {listed}")
    return "\n".join(lines) + "\n"


def _fitting(program: Program, prompt: str) -> np.ndarray:
    data = program.experiment.data
    ids = encode_prompt(program.tokenizer, prompt, data.markers)
    if len(ids) > data.sequence_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens; this model reads {data.sequence_length}; shorten it"
        )
    return ids


def encode_prompt(tokenizer: Tokenizer, prompt: str, markers: bool) -> np.ndarray:
    """int32 ids of a prompt in which <mask> stands for a blank, after BOS if documents have markers."""
    pieces: list[np.ndarray] = [np.array([BOS] if markers else [], np.int32)]
    for i, part in enumerate(prompt.split(MASK_TEXT)):
        pieces += [np.array([MASK], np.int32)] * (i > 0) + [tokenizer.encode(part)]
    return np.concatenate(pieces).astype(np.int32)
