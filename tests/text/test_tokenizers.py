import tracemalloc

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.text import corpora, tokenizers
from llm_jax.text.tokenizers import BOS, EOS, FIRST_TEXT_ID, MASK, PAD, UNKNOWN

TRICKY = [
    "",
    " ",
    "   leading and trailing  ",
    "a  b   c",
    "\n\n\n",
    "\t\tif x:\r\n\t\t\treturn\n",
    "日本語の文章。中文字符",
    "👩‍👩‍👧 🇩🇪 ✈️",
    "e\u0301 n\u0303 क्षि",  # combining marks stay as they are written
    "\u00e9 Ａ ﬁ",  # nothing is normalised
    "\ufeff\u2028\u00a0\u200b\x00\x7f\ufffd",
    "<pad><s></s><mask><unk> <0x41>",
    "0123456789 3.14159",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def docs():
    return [document.text for document in corpora.read(["python:docs"])]


@pytest.fixture(scope="module")
def trained(docs):
    """{name: tokenizer}, sentencepiece in both its models."""
    return {
        "byte": tokenizers.ByteConfig().train(docs),
        "char": tokenizers.CharConfig().train([*TRICKY, *docs[:5]]),
        "sentencepiece": tokenizers.SentencePieceConfig(vocab_size=600).train(docs),
        "unigram": tokenizers.SentencePieceConfig(vocab_size=600, model_type="unigram").train(docs[:20]),
    }


NAMES = ("byte", "char", "sentencepiece", "unigram")


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(trained, name, text):
    tokenizer = trained[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert np.all((ids >= FIRST_TEXT_ID) & (ids < tokenizer.vocab_size))


@pytest.mark.parametrize("name", ["byte", "sentencepiece", "unigram"])
def test_round_trip_of_a_corpus(trained, name, docs):
    tokenizer = trained[name]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in docs)


@pytest.mark.parametrize("name", NAMES)
def test_text_decoded_in_two_parts_is_the_same(trained, name):
    """A prompt and its continuation: no space is lost or made where they meet."""
    tokenizer, text = trained[name], "  x tree of the\n\ttree  "
    ids = tokenizer.encode(text)
    assert all(tokenizer.decode(ids[:i]) + tokenizer.decode(ids[i:]) == text for i in range(len(ids)))


@pytest.mark.parametrize("name", NAMES)
def test_special_ids_are_left_out_of_text(trained, name):
    tokenizer = trained[name]
    ids = tokenizer.encode("<s>")
    assert tokenizer.decode([BOS, *ids[:2], MASK, PAD, *ids[2:], EOS, PAD]) == "<s>"


def test_special_ids_of_sentencepiece_are_ours(trained):
    processor = trained["sentencepiece"]._processor
    assert processor.pad_id() == PAD and processor.bos_id() == BOS
    assert processor.eos_id() == EOS and processor.unk_id() == UNKNOWN
    assert processor.piece_to_id(tokenizers.MASK_TEXT) == MASK


def test_char_ids_are_one_each_in_code_point_order(trained):
    tokenizer = tokenizers.CharConfig().train(["cab", "bad🙂"])
    assert tokenizer.vocab_size == FIRST_TEXT_ID + 5
    assert tokenizer.encode("abcd🙂").tolist() == [5, 6, 7, 8, 9]


def test_char_that_is_not_known():
    tokenizer = tokenizers.CharConfig().train(["bd"])
    ids = tokenizer.encode("abcde🙂")  # below, between and above what is known
    assert ids.tolist() == [UNKNOWN, 5, UNKNOWN, 6, UNKNOWN, UNKNOWN]
    assert tokenizer.decode(ids) == "\ufffdb\ufffdd\ufffd\ufffd"


def test_sentencepiece_is_shorter_than_bytes(trained, docs):
    text = "".join(docs)
    assert len(trained["sentencepiece"].encode(text)) < 0.7 * len(text.encode())
    assert trained["sentencepiece"].vocab_size == 600


def test_sentencepiece_learns_from_evenly_spaced_lines():
    """With half of the lines sampled, what stands only in the others is not learnt."""
    text = "".join(f"apple{i} tree\nbanana{i} palm\n" for i in range(300))
    tokenizer = tokenizers.SentencePieceConfig(vocab_size=290, sample_lines=300).train([text])
    assert len(tokenizer.encode("apple tree")) < 5
    assert len(tokenizer.encode("banana palm")) > 5


def test_sentencepiece_holds_no_more_than_its_sample():
    """Of 4 MB of text, read as it comes, twice."""

    class Texts:
        read = 0

        def __iter__(self):
            self.read += 1
            return (f"apple{i} tree and palm\n" * 100 for i in range(1500))

    texts = Texts()
    tracemalloc.start()
    tokenizers.SentencePieceConfig(vocab_size=300, sample_lines=1000).train(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 and texts.read == 2


@pytest.mark.parametrize("vocab_size", [0, 100, 100_000])
def test_vocabulary_that_cannot_be_learnt(docs, vocab_size):
    with pytest.raises(UserError, match=f"tokenizer.vocab_size={vocab_size}: "):
        tokenizers.SentencePieceConfig(vocab_size=vocab_size).train(docs[:5])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_is_equal(trained, name, tmp_path):
    tokenizer = trained[name]
    tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(tokenizer)
    for text in TRICKY:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
        assert loaded.decode(tokenizer.encode(text)) == text


def test_fingerprints_differ(trained):
    others = [tokenizers.CharTokenizer("ab"), tokenizers.CharTokenizer("abc")]
    assert len({tokenizers.fingerprint(t) for t in (*trained.values(), *others)}) == len(trained) + 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        tokenizers.load(tmp_path / "tokenizer.json")
