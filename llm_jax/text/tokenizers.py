"""Text to token ids and back: characters, bytes, SentencePiece.

All three begin with the same five special ids, so that an objective can tell text from markers.
A trained tokenizer is one sealed JSON file.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import sentencepiece

from llm_jax import storage
from llm_jax.config import identity
from llm_jax.errors import UserError

PAD, BOS, EOS, MASK, UNKNOWN = range(5)
FIRST_TEXT_ID = 5
MASK_TEXT = "<mask>"  # how a person writes a blank in a prompt


class Tokenizer(Protocol):
    """vocab_size counts the five special ids."""

    kind: ClassVar[str]
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of plain text; markers are never produced."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids are left out, but for a CharTokenizer's UNKNOWN, which is U+FFFD."""

    def piece(self, i: int) -> str:
        """The text of one id, blanks kept; a byte beyond ASCII is U+FFFD."""

    def payload(self) -> Any:
        """What ``from_payload`` needs, as JSON."""


class CharTokenizer:
    """One id a character, in code point order."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        self._codes = np.array(sorted(map(ord, set(characters))), np.uint32)
        self.vocab_size = FIRST_TEXT_ID + len(self._codes)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        place = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        known = self._codes[place] == codes
        return np.where(known, place + FIRST_TEXT_ID, UNKNOWN).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._character(int(i)) for i in ids)

    def _character(self, i: int) -> str:
        if FIRST_TEXT_ID <= i < self.vocab_size:
            return chr(self._codes[i - FIRST_TEXT_ID])
        return "\ufffd" if i == UNKNOWN else ""

    def piece(self, i: int) -> str:
        return self._character(i)

    def payload(self) -> str:
        return "".join(map(chr, self._codes))


class ByteTokenizer:
    """One id a UTF-8 byte."""

    kind = "byte"
    vocab_size = FIRST_TEXT_ID + 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + FIRST_TEXT_ID

    def decode(self, ids: Iterable[int]) -> str:
        kept = (int(i) - FIRST_TEXT_ID for i in ids)
        return bytes(i for i in kept if 0 <= i < 256).decode(errors="replace")

    def piece(self, i: int) -> str:
        return self.decode([i])

    def payload(self) -> None:
        return None


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018) with byte fallback, so nothing is unknown.

    All text comes back as it was but for U+2581, SentencePiece's own sign for a space.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if FIRST_TEXT_ID <= i < self.vocab_size]
        return self._processor.decode(kept)

    def piece(self, i: int) -> str:
        if self._processor.is_byte(i):
            return self._processor.decode([i])
        return self._processor.id_to_piece(i).replace("\u2581", " ")

    def payload(self) -> str:
        return base64.b64encode(self._model).decode()


# ---- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CharConfig:
    """Every character of the training text is a token."""

    def train(self, texts: Iterable[str]) -> CharTokenizer:
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(characters))


@dataclass(frozen=True)
class ByteConfig:
    """Every byte is a token; nothing to train."""

    def train(self, texts: Iterable[str]) -> ByteTokenizer:
        del texts
        return ByteTokenizer()


@dataclass(frozen=True)
class SentencePieceConfig:
    """vocab_size: pieces, the five special ids and 256 bytes among them; model_type: bpe or unigram.

    sample_lines: at most so many lines of the training text, evenly spaced, are learnt from and held in
    memory; texts are read twice.
    """

    vocab_size: int = identity(4096)
    model_type: str = identity("bpe")
    sample_lines: int = identity(200_000)

    def train(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        count = sum(1 for _ in _lines(texts))
        stride = max(1, -(-count // self.sample_lines))
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=islice(_lines(texts), 0, None, stride),
                model_writer=model,
                vocab_size=self.vocab_size,
                model_type=self.model_type,
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNKNOWN,
                control_symbols=[MASK_TEXT],
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                num_threads=2,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"tokenizer.vocab_size={self.vocab_size}: SentencePiece cannot learn that many "
                f"pieces from this text ({reason}); choose fewer or give it more text"
            ) from None
        return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Iterable[str], longest: int = 1000) -> Iterator[str]:
    """Lines with their ends, cut where SentencePiece would skip them for their length."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), longest):
                yield line[start : start + longest]


TOKENIZERS = {"char": CharConfig, "byte": ByteConfig, "sentencepiece": SentencePieceConfig}


# ---- files ----------------------------------------------------------------------------------


def save(tokenizer: Tokenizer, path: Path) -> None:
    storage.write_sealed(path, {"kind": tokenizer.kind, "payload": tokenizer.payload()})


def load(path: Path) -> Tokenizer:
    """Raises UserError when the file is missing or corrupt."""
    content = storage.read_sealed(path, f"delete {path.parent} to prepare it again")
    kind, payload = content["kind"], content["payload"]
    if kind == "char":
        return CharTokenizer(payload)
    if kind == "byte":
        return ByteTokenizer()
    return SentencePieceTokenizer(base64.b64decode(payload))


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of what the tokenizer is, in hex."""
    return hashlib.sha256(f"{tokenizer.kind}\n{tokenizer.payload()}".encode()).hexdigest()
