"""A saved cache of which tokens are evicted goes on bit by bit, before the end of its prompt and after an eviction."""

from __future__ import annotations

import pytest
import torch
from helpers.forgeries import Forger, at, put
from helpers.generation import word_tokenizer
from helpers.store_cases import CASES, patched_case
from helpers.tiny import left_padded

from hf_longctx import CacheError, LongCtxCache

BY_DATA = [case for case, given in CASES.items() if given["store"] == "evicted"]
HEAD = next(case for case in BY_DATA if CASES[case].get("by", "head") == "head")
GATHERS = {"rule": {"score": "observed", "mean": True}, "budget": {"share": 0.5}, "recent": 4}


def filled(model, lengths, tokens, chunk=None):
    """A cache that read left-padded sequences, and decoded ``tokens`` tokens; and their mask."""
    ids, mask = left_padded(lengths)
    cache = LongCtxCache(model)
    ids = torch.cat([ids, torch.randint(3, 97, (len(lengths), tokens))], 1)
    mask = torch.cat([mask, mask.new_ones(len(lengths), tokens)], 1)
    whole = ids.shape[1] - tokens
    ends = [*range(chunk or whole, whole, chunk or whole), *range(whole, ids.shape[1] + 1)]
    for low, high in zip([0, *ends], ends, strict=False):
        step(model, cache, ids[:, low:high], mask[:, :high])
    return cache, mask


@torch.no_grad()
def step(model, cache, ids, mask):
    return model(ids, attention_mask=mask, past_key_values=cache).logits


def goes_on(model, cache, mask):
    """Logits of a piece of the prompt, tokens, a rollback, a second prompt, tokens, other sequences."""
    told = torch.Generator().manual_seed(7)
    seen = []

    def steps(*counts):
        nonlocal mask
        for count in counts:
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
            seen.append(step(model, cache, torch.randint(3, 97, (len(mask), count), generator=told), mask))

    steps(5, 1, 1, 4)
    cache.crop(-3)
    mask = mask[:, :-3]
    steps(1, 140, 1, 1)
    cache.reorder_cache(torch.arange(len(mask)).flip(0))
    mask = mask.flip(0)
    steps(1)
    return seen, cache.nbytes


@pytest.mark.spanning(("case", "tokens"))
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("lengths", [[150], [150, 60, 3], [150, 150]])
@pytest.mark.parametrize("case", [*BY_DATA, "gathers"])
def test_a_loaded_cache_goes_on_bit_by_bit(case, lengths, tokens, tmp_path):
    fields = GATHERS if case == "gathers" else {}
    model = patched_case(HEAD if case == "gathers" else case, torch.float64, **fields)
    cache, mask = filled(model, lengths, tokens, chunk=70)
    cache.save(tmp_path / "a")
    loaded = LongCtxCache.load(tmp_path / "a", model)
    for name in ("seen", "starts", "reading", "prompt_end", "nbytes", "oldest_crop"):
        assert getattr(loaded, name) == getattr(cache, name), name
    assert cache.reading == (tokens == 0)
    (want, held), (got, again) = goes_on(model, cache, mask), goes_on(model, loaded, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and held == again
    other = filled(model, lengths, tokens)[0]
    assert not torch.equal(goes_on(model, other, mask)[0][0], want[0]), "a control"


def test_what_was_judged_when_it_was_asked_is_saved(tmp_path):
    model = patched_case(HEAD, torch.float64, rule={"score": "kvzip"})
    cache, _ = filled(model, [60], 0)
    cache.compress("kvzip", tokenizer=word_tokenizer())
    cache.save(tmp_path / "a")
    loaded = LongCtxCache.load(tmp_path / "a", model)
    new = torch.arange(3, 12)[None]
    logits = []
    for one in (cache, loaded):
        step(model, one, new, None)
        one.compress("kvzip", {"share": 0.3}, tokenizer=word_tokenizer())
        logits.append(step(model, one, new[:, :1], None))
    assert torch.equal(*logits)


def test_a_file_without_what_was_known_of_queries_goes_on_otherwise(tmp_path):
    model = patched_case(HEAD, torch.float64)
    cache, mask = filled(model, [150], 0)
    cache.save(tmp_path / "a")
    loaded = LongCtxCache.load(tmp_path / "a", model)
    for layer in loaded.own:
        for store in layer.evicting:
            for one in store.known.parts.values():
                one.q = one.q.flip(3)
    want = goes_on(model, cache, mask)[0]
    assert not all(torch.equal(a, b) for a, b in zip(goes_on(model, loaded, mask)[0], want, strict=True))


@pytest.fixture(scope="module", params=[0, 2], ids=["before", "after"])
def forged(request, tmp_path_factory):
    """A batch before and after an eviction by head, and where its store is in a file."""
    folder = tmp_path_factory.mktemp("forged")
    model = patched_case(HEAD, torch.float32, layers=2)
    filled(model, [150, 60], request.param)[0].save(folder / "true")
    assert LongCtxCache.load(folder / "true", model).seen == 150 + request.param, "a control: the true file"
    return model, Forger(folder / "true"), folder / "false", ("kept", 0, "stores", "retrieval")


def refused(forged, edit, said):
    model, forger, path, _ = forged
    with pytest.raises(CacheError, match=said):
        LongCtxCache.load(forger.write(path, edit), model)


def changed(end, how):
    """Change the tensor of the first layer whose name ends so; a control: there is one."""

    def edit(tensors, told):
        name = next(name for name in tensors if name.endswith(end))
        tensors[name] = how(tensors[name].clone()).contiguous()

    return edit


def test_where_heads_read_is_checked(forged):
    if "layers.0.retrieval.segments.ragged.k" not in forged[1].tensors:
        pytest.skip("of what an eviction left")

    def moved(index, by):
        def how(x):
            x.view(-1)[index] += by
            return x

        return how

    for by in (1, -1, 2**40, -(2**40), 2**62):
        refused(forged, changed("ragged.starts", moved(1, by)), "tokens begin at|outside|has .* of its|have .* of its")
        refused(forged, changed("ragged.lengths", moved(0, by)), "tokens begin at|outside|have .* of its")
    for by in (1, -1, 150, 2**31 - 1):
        refused(forged, changed("ragged.positions", moved(0, by)), "positions of row 0")
    refused(forged, changed("ragged.positions", lambda x: x.flip(0)), "positions of row")
    refused(forged, changed("ragged.k", lambda x: x[:-1]), "ragged.v: it is")


def test_the_geometry_of_a_cut_is_checked(forged):
    place = (*forged[3], "cut")
    if at(forged[1].told, place) is None:
        return refused(forged, lambda tensors, told: put(told, place, {}), "cut: got")
    for name, wrong in (("slots", (0, -1, 153, 149, 2**40)), ("held", (1, -1)), ("starts", ([0], [1, 0], [-1, 0]))):
        for value in wrong:
            refused(forged, lambda tensors, told, name=name, value=value: put(told, (*place, name), value), "")
    return None


def test_what_is_known_of_queries_is_checked(forged):
    place = (*forged[3], "known")
    parts = at(forged[1].told, (*place, "parts"))
    if not parts:
        return refused(forged, lambda tensors, told: put(told, (*place, "scores"), 1), "scores: got")
    for name, wrong in (
        ("row", (2, -1, -2)),
        ("head", (0, 4, -2)),
        ("start", (1, -1)),
        ("processed", (151, -1)),
        ("gathered", (151, -1)),
        ("queries", (0, 151, 2**40)),
        ("state", (["sums"],)),
    ):
        for value in wrong:
            edit = lambda tensors, told, name=name, value=value: put(told, (*place, "parts", 0, name), value)  # noqa: E731
            refused(forged, edit, "says what is true of no cache")
    for value in (0.0, -1.0, 1, "a", None):
        refused(
            forged, lambda tensors, told, value=value: put(told, (*place, "scores", "scale"), value), "scale: got|none"
        )
    refused(forged, changed("known.0.q", lambda x: x[:, :, 1:]), "known.0.q: it is")
    return None


def test_the_moment_is_checked(forged):
    for name, wrong in (("prompt_end", (-1, 2**70, 1.5)), ("reading", (None, 1))):
        for value in wrong:
            refused(forged, lambda tensors, told, name=name, value=value: put(told, ("cache", name), value), name)
