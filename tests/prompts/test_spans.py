"""Which tokens of a text belong to which of its parts."""

from __future__ import annotations

import pytest
from helpers.tiny_tokenizer import byte_bpe

from hf_longctx import ConfigError
from hf_longctx.prompts.spans import tokens_of

PARTS = ("The first passage, about stones.", "A second one: über zwölf Größen.", "x")


def joined(between: str) -> tuple[str, list[tuple[int, int]]]:
    text = between.join(PARTS)
    return text, [(text.index(part), text.index(part) + len(part)) for part in PARTS]


@pytest.mark.parametrize("between", ["\n\n", " ", " ### "])
def test_the_tokens_of_a_part_say_it(between):
    tokenizer = byte_bpe()
    text, parts = joined(between)
    ids, spans = tokens_of(tokenizer, text, parts)
    assert ids.tolist() == tokenizer(text)["input_ids"]
    for part, (first, end) in zip(PARTS, spans, strict=True):
        assert part in tokenizer.decode(ids[first:end])
        assert part not in tokenizer.decode(ids[first + 1 : end]) and part not in tokenizer.decode(ids[first : end - 1])


def test_a_part_without_a_token_and_a_tokenizer_without_offsets_are_refused():
    with pytest.raises(ConfigError, match="has no token"):
        tokens_of(byte_bpe(), "abc", [(1, 1)])

    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="offsets"):
        tokens_of(Slow(), "abc", [(0, 1)])
