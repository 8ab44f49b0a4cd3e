"""What tasks are said in: pieces that are text again when joined, filler of every kind, chat templates."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.kinds import CHAT, TEXTS, language_of, tokenizer_of
from helpers.tiny_tokenizer import byte_bpe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_longctx.assets import BOOK
from hf_longctx.errors import ConfigError
from hf_longctx.tasks import _words, task_from
from hf_longctx.tasks._fit import largest
from hf_longctx.tasks.haystack import Sentences, TextHaystack, TinyFiller, TokenNoise, weave
from hf_longctx.tasks.language import TextLanguage, TinyLanguage, language_for, listed

DRAWS = {
    "names": 1024,
    "passkeys": 9 * 10**4,
    "numbers": 9 * 10**6,
    "ids": 16**12,
    "coded": 857375,
    "prices": 8000,
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", TEXTS)
def test_pieces_joined_as_ids_read_as_the_text(kind):
    language = language_of(kind)
    pieces = ["the code of one", " is 4711.", " the next is 0815.", " what is it?"]
    joined = language.decode([i for piece in pieces for i in language.encode(piece)])
    assert joined.split() == "".join(pieces).split() and len(joined.split()) == 13
    apart = language.tokenizer(" is 4711.", add_special_tokens=False)["input_ids"]
    doubled = language.decode([*apart, *language.tokenizer("the")["input_ids"]])
    assert doubled.strip() == "is 4711. the" or kind != "legacy", "a control: it puts a space before every piece"


@pytest.mark.parametrize(("kind", "prefix"), [("bytes", 0), ("bos_eos", 1), ("wordpiece", 1), ("unigram", 0)])
def test_a_prompt_begins_as_the_tokenizer_begins_one_and_never_ends(kind, prefix):
    language, tokenizer = language_of(kind), tokenizer_of(kind)
    full = tokenizer("the child")["input_ids"]
    assert language.prefix == full[:prefix]
    sample = task_from("passkey").make(language, 700)
    special = set(tokenizer.all_special_ids)
    assert not special & {*sample.context[prefix:].tolist(), *sample.questions[0].prompt.tolist()} - {
        tokenizer.unk_token_id
    }


@pytest.mark.parametrize("name", DRAWS)
def test_keys_and_values_are_different_and_none_is_part_of_another(name):
    drawn = getattr(_words, name)(rng(), 300)
    assert len(set(drawn)) == 300 and len(getattr(_words, name)(rng(), 1)) == 1
    assert not [1 for a in drawn for b in drawn if a != b and a in b]
    for kind in TEXTS:
        language = language_of(kind)
        assert all(language.decode(language.encode(f" {one}.")).strip() == f"{one}." for one in drawn[:40])
    with pytest.raises(ConfigError, match=f"more than the {DRAWS[name]} different"):
        getattr(_words, name)(rng(), DRAWS[name] + 1)


def test_sentences_share_no_word_with_names_and_hold_no_digit():
    said = " ".join(_words.sentences(rng(), 400)).casefold()
    assert not {*said.replace(".", "").split()} & {*_words.FIRST, *_words.LAST}
    assert len(_words.FIRST) == len(set(_words.FIRST)) == len(_words.LAST) == len(set(_words.LAST)) == 32
    assert not any(letter.isdigit() for letter in said) and len(set(_words.sentences(rng(), 400))) == 400


def test_the_book_is_prose_alone():
    """Paragraphs of plain letters, and nothing of whoever digitised it."""
    text = BOOK.read_text("utf-8")
    assert text.isascii() and 200_000 < len(text) < 400_000 and not re.search(r"[_*\[\]\t]|  |\n\n\n", text)
    assert not re.search("gutenberg|\\bebook|http|copyright|licen[sc]e agreement", text, re.IGNORECASE)
    assert text.startswith("Chapter I\n\nAs the streets") and text.endswith("in time for breakfast.\n")


def test_people_share_no_name_and_the_book_knows_none_of_them():
    people = _words.people(rng(), 24)
    said = [name for one in people for name in one.split()]
    assert len(set(said)) == 48 and not any(one in BOOK.read_text("utf-8") for one in people)
    with pytest.raises(ConfigError, match="24 different"):
        _words.people(rng(), 25)


def test_filler_comes_from_where_it_was_asked_for(tmp_path):
    (tmp_path / "x.txt").write_text("bacob bacob. " * 50)
    tokenizer = byte_bpe()
    assert isinstance(language_for(tokenizer).haystack, Sentences)
    assert isinstance(language_for(tokenizer, "noise").haystack, TokenNoise)
    assert isinstance(language_for(tokenizer, text=tmp_path).haystack, TextHaystack)
    book = language_for(tokenizer, "book").haystack
    assert isinstance(book, TextHaystack) and tokenizer.decode(book.ids.tolist()) == BOOK.read_text("utf-8")
    tiny = language_for(tokenizer_of("tiny"))
    assert isinstance(tiny, TinyLanguage) and isinstance(tiny.haystack, TinyFiller) and tiny.longest == 4096
    for language in (language_for(tokenizer, "noise"), language_for(tokenizer, text=tmp_path)):
        sample = task_from("needle:variant=multi_value").make(language, 900, 0.5)
        assert sample.length == 900 and language.decode(sample.context).count("One of the codes") == 4
    assert language.decode(sample.context).count("bacob") > 50
    sentences = language_for(tokenizer).filler(rng(), 500)
    assert len(sentences) == 500 and language_for(tokenizer).decode(sentences).startswith(" The ")


@pytest.mark.parametrize("kind", ["bytes", "bos_eos", "legacy"])
def test_a_text_about_special_tokens_holds_none(kind, tmp_path):
    text = "The token </s> ends a text that <s> began. " * 30
    (tmp_path / "x.txt").write_text(text)
    tokenizer = tokenizer_of(kind)
    filler = language_for(tokenizer, text=tmp_path).haystack.ids.tolist()
    assert not {*filler} & {*tokenizer.all_special_ids} and tokenizer.decode(filler).strip() == text.strip()
    assert {*tokenizer(text)["input_ids"]} & {*tokenizer.all_special_ids}, "a control, and the tokenizer is as before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"haystack": "sentenses"}, "haystack: got 'sentenses'.*Did you mean 'sentences'"),
        ({"haystack": "noise", "text": "x.txt"}, "haystack: 'noise' and a text were given"),
        ({"text": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_a_language_cannot_be_made_of(arguments, message):
    with pytest.raises(ConfigError, match=message):
        language_for(byte_bpe(), **arguments)


@pytest.mark.parametrize("arguments", [{"haystack": "noise"}, {"chat": True}])
def test_the_embedded_models_have_one_filler_and_no_chat(arguments):
    with pytest.raises(ConfigError, match="embedded models' language has no chat and one filler"):
        language_for(tokenizer_of("tiny"), **arguments)


def test_a_tokenizer_that_loses_digits_is_refused():
    words = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26, ".": 27}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(ConfigError, match="need letters and digits"):
        TextLanguage(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]"))


def test_more_notes_than_the_embedded_models_have_are_refused():
    language = language_of("tiny")
    assert len(set(language.draw(rng(), 4096, None)[0])) == 4096
    with pytest.raises(ConfigError, match="more than the 4096 different notes"):
        language.draw(rng(), 4097, None)


# Chat.


def chat_language() -> TextLanguage:
    return language_for(tokenizer_of("bos_eos"), chat=True)


def rendered(sample, answers: list[str]) -> list[int]:
    """A conversation as ids: the context, its questions, and ``answers`` to all but the last."""
    ids = list(sample.context)
    for i, question in enumerate(sample.questions):
        ids += [*(sample.between if i else ()), *question.prompt]
        if i < len(answers):
            ids += chat_language().encode(f" {answers[i]}")
    return ids


def test_a_chat_prompt_is_what_the_template_makes_of_it():
    language, tokenizer = chat_language(), tokenizer_of("bos_eos")
    task = task_from("needle:variant=multi_key:questions=2")
    sample = task.make(language, 1200, seed=2)
    assert sample.length == 1200
    text = tokenizer.decode(rendered(sample, ["1234567."]), clean_up_tokenization_spaces=False)
    first, rest = text.removeprefix("<s><|user|>\n").split("</s>\n<|assistant|>\n", 1)
    lead, rest = rest.split(" 1234567.", 1)
    second = rest.removeprefix("</s>\n<|user|>\n").split("</s>\n")[0]
    said = [("user", first), ("assistant", f"{lead} 1234567."), ("user", second.strip())]
    messages = [{"role": role, "content": content} for role, content in said]
    by_template = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ours = text.rpartition("<|assistant|>\n")[0] + "<|assistant|>\n"
    assert ours.replace("<|user|>\n\n\n", "<|user|>\n") == by_template
    assert lead.startswith("The code of the ") and text.endswith(" is")
    plain = task.make(language_of("bos_eos"), 1200, seed=2)
    assert "<|user|>" not in tokenizer.decode(plain.context), "a control"


@pytest.mark.parametrize("template", ["hello", CHAT.replace("{{ m['content'] | trim }}", "{{ m['content'] * 2 }}")])
def test_a_template_that_changes_what_is_said_is_refused(template):
    tokenizer = byte_bpe(300)
    tokenizer.chat_template = template
    try:
        with pytest.raises(ConfigError, match="does not repeat what is said exactly once"):
            language_for(tokenizer, chat=True)
    finally:
        tokenizer.chat_template = None


# Small parts.


def test_weaving_puts_pieces_between_filler():
    assert weave([1, 2, 3], [0, 2, 2, 3], [[7], [8, 8], [], [9]]) == ([7, 1, 2, 8, 8, 3, 9], [0, 3, 5, 6])
    assert weave([1, 2], [], []) == ([1, 2], [])


def test_the_largest_that_fits_is_found():
    tried = []

    def build(n: int) -> int:
        tried.append(n)
        return n

    for room in (1, 2, 3, 10, 999, 12345):
        tried.clear()
        assert largest(build, lambda n: 3 * n + 40, 2, 3 * room + 41) == max(2, room)
        assert len(tried) < 20


def test_lists_of_words():
    assert [listed("a"), listed("ab"), listed("abc")] == ["a", "a and b", "a, b and c"]
