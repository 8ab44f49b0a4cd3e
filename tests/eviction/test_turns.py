"""Two prompts in one cache, each evicted where it ends, by every score."""

from __future__ import annotations

import pytest
import torch
from helpers.seen import CASES, WORDS, rule_of
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxCache, patch_model
from hf_longctx.cache.plan import FEWEST
from hf_longctx.config.words import dump, load

# A case of each word that scores by itself.
FIRST = {word: name for name, word in reversed(WORDS.items()) if load("eviction", word).moment == "prompt"}
WAYS = [("uniform", "drop"), ("head", "merge")]


def model_of(case: str, by: str, after: str, share: float = 0.4):
    torch.manual_seed(0)
    model = tiny_model("llama", torch.float64, layers=2)
    store = {"store": "evicted", "rule": dump(rule_of(case), "score"), "budget": {"share": share}, "by": by}
    store |= {"sink": 2, "recent": 8, "after": {"after": after}}
    return patch_model(model, config_for(model, "retrieval", stores={"retrieval": store}))


def two_turns(model, first, second, words, size: int = 1000) -> torch.Tensor:
    """The logits of words that are decoded after each of two prompts, which are read ``size`` tokens at a time."""
    cache, found = LongCtxCache(model), []
    for prompt in (first, second):
        with torch.no_grad():
            for part in prompt.split(size, 1):
                model(part, past_key_values=cache)
            found += [model(word, past_key_values=cache).logits for word in words.split(1, 1)]
    return torch.cat(found, 1)


@pytest.mark.spanning
@pytest.mark.parametrize("case", FIRST.values())
@pytest.mark.parametrize(("by", "after"), WAYS)
def test_a_batch_and_pieces_say_the_same(case, by, after):
    """Heads of one sequence that keep as many tokens as they like, and those of another: known each by itself."""
    by = "uniform" if rule_of(case).alike else by
    model = model_of(case, by, after)
    texts = [torch.randint(3, 97, (2, count)) for count in (90, 260, 2)]
    want = two_turns(model, *texts)
    assert (two_turns(model_of(case, by, after, share=1.0), *texts) - want).abs().max() > 1e-2
    for row in range(2):
        alone = two_turns(model, *(text[row : row + 1] for text in texts))
        torch.testing.assert_close(alone[0], want[row], rtol=0, atol=1e-9)
    torch.testing.assert_close(two_turns(model, *texts, size=FEWEST + 2), want, rtol=0, atol=1e-9)


def test_every_word_is_here():
    assert {word for word in WORDS.values() if load("eviction", word).moment == "prompt"} == set(FIRST)
    assert set(FIRST.values()) <= set(CASES) and len(FIRST) > 5
