"""Documents with facts: exact lengths, facts where they are said to be, answers that repeat them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoTokenizer

from hf_longctx import ConfigError
from hf_longctx.assets import asset
from hf_longctx.tasks.documents import PasskeyDocuments, TinyDocuments, documents_for
from hf_longctx.tasks.haystack import (
    TextHaystack,
    TinyFiller,
    TokenNoise,
    is_tiny_language,
    ordinary_tokens,
    word_tokens,
)

pytestmark = pytest.mark.quick


def tokenizer_of(kind: str):
    return AutoTokenizer.from_pretrained(asset("tiny-llama")) if kind == "tiny" else byte_bpe()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", ["tiny", "bpe"])
@pytest.mark.parametrize("length", [400, 777, 1024, 4096])
@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_a_document_holds_its_facts_twice(kind, length, depth):
    made = documents_for(tokenizer_of(kind)).draw(rng(3), length, 2, depth)
    assert made.ids.shape == (length,)
    told, answered = made.ids[made.needles], made.ids[made.answers]
    assert np.array_equal(told, answered)
    assert not np.array_equal(told[0], told[1]), "a control: the facts differ"
    assert not np.array_equal(made.ids[made.needles + 1], answered), "a control: one place on is something else"
    assert made.answers[-1, -1] in (length - 1, length - 2)
    assert (np.diff(made.answers[:, 0]) > 0).all() and made.needles.max() < made.answers.min() - 1


@pytest.mark.parametrize("kind", ["tiny", "bpe"])
def test_the_question_repeats_what_introduces_the_fact(kind):
    made = documents_for(tokenizer_of(kind)).draw(rng(5), 2048, 4)
    for answer, needle in zip(made.answers[:, 0], made.needles[:, 0], strict=True):
        asked, told = made.ids[answer - 3 : answer], made.ids[needle - 3 : needle]
        assert np.array_equal(asked, told)  # the key and "is"; the tiny language says "ask" for "note" before it
    assert len({tuple(made.ids[answer - 3 : answer]) for answer in made.answers[:, 0]}) == 4


@pytest.mark.parametrize("kind", ["tiny", "bpe"])
def test_depth_moves_the_facts(kind):
    documents = documents_for(tokenizer_of(kind))
    first = [documents.draw(rng(1), 2000, 1, depth).needles[0, 0] for depth in (0, 0.25, 0.5, 1)]
    assert first == sorted(first) and first[0] < 30 and first[-1] > 1800
    spread = {int(documents.draw(rng(seed), 2000, 1).needles[0, 0]) for seed in range(6)}
    assert len(spread) > 3


def test_documents_depend_on_the_generator_alone():
    documents = documents_for(byte_bpe())
    one, same, other = (documents.draw(rng(seed), 900) for seed in (7, 7, 8))
    assert np.array_equal(one.ids, same.ids) and not np.array_equal(one.ids, other.ids)


def test_the_default_number_of_facts_fits_the_length():
    tiny, passkeys = documents_for(tokenizer_of("tiny")), documents_for(byte_bpe())
    assert len(tiny.draw(rng(), 4096).answers) == 16 and len(tiny.draw(rng(), 64).answers) == 3
    assert len(passkeys.draw(rng(), 4096).answers) == 10 and len(passkeys.draw(rng(), 200).answers) < 3


@pytest.mark.parametrize("kind", ["tiny", "bpe"])
def test_no_room_for_a_fact_is_an_error_with_the_length_it_needs(kind):
    documents = documents_for(tokenizer_of(kind))
    with pytest.raises(ConfigError, match=r"length: got 10 tokens, .* needs (\d+)") as caught:
        documents.draw(rng(), 10)
    needed = int(str(caught.value).split("needs ")[1].rstrip("."))
    assert len(documents.draw(rng(), needed).ids) == needed
    with pytest.raises(ConfigError):
        documents.draw(rng(), needed - 1)


def test_more_passkeys_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="at most 10"):
        documents_for(byte_bpe()).draw(rng(), 4096, 11)


def test_the_language_is_known_by_its_vocabulary():
    assert isinstance(documents_for(tokenizer_of("tiny")), TinyDocuments)
    assert isinstance(documents_for(byte_bpe()), PasskeyDocuments)
    assert not is_tiny_language(byte_bpe())


def test_ordinary_tokens_leave_special_ones_out_and_words_are_words():
    tokenizer = byte_bpe()
    ids = ordinary_tokens(tokenizer)
    assert not set(ids) & set(tokenizer.all_special_ids) and len(ids) == len(tokenizer) - 3
    words = word_tokens(tokenizer, ids)
    texts = [tokenizer.decode([i]) for i in words]
    assert len(words) >= 256 and all(text[0] == " " and text[1:].isalpha() for text in texts)
    few = byte_bpe(300)
    assert np.array_equal(word_tokens(few, ordinary_tokens(few)), ordinary_tokens(few)), "few words: all tokens"


class Seven:
    """A tokenizer of seven tokens."""

    all_special_ids = (0,)

    def get_vocab(self):
        return {str(i): i for i in range(7)}


def test_a_tokenizer_of_a_few_tokens_is_refused():
    with pytest.raises(ConfigError, match="6 ordinary tokens; at least 32"):
        ordinary_tokens(Seven())


def test_text_comes_from_files_in_the_order_of_their_names(tmp_path):
    tokenizer = byte_bpe()
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.md").mkdir()
    assert tokenizer.decode(TextHaystack.read(tokenizer, tmp_path).ids) == "first\n\nsecond"
    assert tokenizer.decode(TextHaystack.read(tokenizer, tmp_path / "a.txt").ids) == "first"


@pytest.mark.parametrize("what", ["missing", "empty", "binary", "empty folder"])
def test_unreadable_text_is_an_error(tmp_path, what):
    path = tmp_path / "text.txt"
    if what == "empty":
        path.write_text(" \n")
    elif what == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif what == "empty folder":
        path.mkdir()
    with pytest.raises(ConfigError, match="text"):
        documents_for(byte_bpe(), path)


def test_a_short_text_starts_again_and_a_long_one_is_read_in_pieces():
    assert TextHaystack([5, 6, 7]).sample(rng(), 7).tolist() == [5, 6, 7, 5, 6, 7, 5]
    long = TextHaystack(range(1000))
    piece = long.sample(rng(), 10)
    assert (np.diff(piece) == 1).all() and piece[0] > 0
    assert long.sample(rng(), 1000).tolist() == list(range(1000))


def test_the_filler_is_the_users_text(tmp_path):
    tokenizer = byte_bpe()
    (tmp_path / "x.txt").write_text("bacob" + " bacob" * 50)
    made = documents_for(tokenizer, tmp_path / "x.txt").draw(rng(), 600, 1, 1.0)
    filler = made.ids[1 : made.needles[0, 0] - 20]
    assert set(filler) <= set(tokenizer("bacob bacob")["input_ids"])
    assert isinstance(documents_for(tokenizer_of("tiny")).haystack, TinyFiller)
    assert isinstance(documents_for(tokenizer).haystack, TokenNoise)
