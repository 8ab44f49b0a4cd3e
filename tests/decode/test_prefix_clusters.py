"""``select: prefix_clusters``: clusters of a prefix above one threshold of all layers and heads."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers.forgeries import Forger, at, changed, others, places, put
from helpers.selecting import SMALL, assert_padded_as_alone, read, selecting_model

from hf_longctx import CacheError, ConfigError, LongCtxCache, PromptCache, observe, report
from hf_longctx.decode._weights import EVERYTHING, quantile
from hf_longctx.decode.prefix_clusters import PrefixClusters
from hf_longctx.layout.segments import Segment

STORES = ("full", {"store": "quantized", "bits": 8}, "offloaded", "offloaded_disk")
FIELDS = {"percent": 20.0, "observation": 8, "quantile": 0.6, "recent": 8}
TOLERANCE = 1e-12
EVERY = [pytest.param(one, marks=pytest.mark.slow if at else ()) for at, one in enumerate(PrefixClusters.cases)]


def spec(**fields) -> PrefixClusters:
    return PrefixClusters(**{**SMALL, **FIELDS, **fields})


@functools.cache
def ids(tokens: int = 200, batch: int = 1, seed: int = 5):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def some_layers(layers: int = 3, tokens: int = 120, batch: int = 1, heads: int = 2, group: int = 2, dim: int = 8):
    make = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=make)  # noqa: E731
    layers = [
        (draw(batch, heads * group, tokens, dim) * (1 + at), draw(batch, heads, tokens, dim)) for at in range(layers)
    ]
    return layers


def settled(one: PrefixClusters, layers, scale: float = 0.5):
    """The indexes of layers (q, k) that read a prompt."""
    indexes = []
    for q, _ in layers:
        indexes.append(one.new_index())
        for low in range(0, q.shape[2], 50):  # in parts
            indexes[-1].saw(q[:, :, low : low + 50], low, scale)
    assert all(index.waits for index in indexes)
    one.settle(indexes, [[Segment(k, k, k.shape[2])] for _, k in layers])
    assert not any(index.waits for index in indexes)
    return indexes


def weights_by_hand(one, q, k, clusters, scale: float):
    """Of each cluster (tokens): exp(q.C) / sum_j N_j exp(q.C_j), mean over queries ``[G, T, D]``."""
    centroids = torch.stack([k[tokens].mean(0) for tokens in clusters])
    counts = torch.tensor([float(len(tokens)) for tokens in clusters], dtype=torch.float64)
    e = (q @ centroids.T * scale).exp()
    return (e / (e @ counts)[..., None]).flatten(0, -2).mean(0)


def members(index, row: int, head: int) -> list[list[int]]:
    counts = index.counts[row, head].tolist()
    order = index.order[row, head].tolist()
    begins = [sum(counts[:at]) for at in range(len(counts))]
    return [sorted(order[b : b + n]) for b, n in zip(begins, counts, strict=True) if n]


def test_it_is_the_definition():
    """One threshold over all layers and heads; a decoded query reads what is above it."""
    one, layers, scale = spec(), some_layers(), 0.5
    indexes = settled(one, layers, scale)
    everything = []
    for (q, k), index in zip(layers, indexes, strict=True):
        for head in range(2):
            clusters = members(index, 0, head)
            assert sorted(sum(clusters, [])) == list(range(4, 112))
            own = weights_by_hand(one, q[0, 2 * head : 2 * head + 2, -8:], k[0, head], clusters, scale)
            everything += [(w, len(tokens)) for w, tokens in zip(own.tolist(), clusters, strict=True)]
    everything.sort()
    left, threshold = 0, 0.0
    for weight, count in everything:
        left += count
        if left > 0.6 * sum(n for _, n in everything):
            break
        threshold = weight
    for index in indexes:
        torch.testing.assert_close(index.threshold.exp(), torch.full((1, 2, 1), threshold).double(), rtol=1e-6, atol=0)
    shares = []
    for (_, k), index in zip(layers, indexes, strict=True):
        query = torch.randn(1, 4, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 2
        choice = one.choose(query, index, [Segment(k, k, 120)], 120, scale)
        assert (choice.low, choice.high) == (4, 112)
        for head in range(2):
            clusters = members(index, 0, head)
            own = weights_by_hand(one, query[0, 2 * head : 2 * head + 2], k[0, head], clusters, scale)
            want = sorted(sum((c for c, w in zip(clusters, own.tolist(), strict=True) if w > threshold), []))
            count = int(choice.counts[0, head])
            assert choice.entries[0, head, :count].tolist() == want
            shares.append(count / 108)
    assert min(shares) < 0.3 and max(shares) > min(shares) + 0.1, "heads get a budget of their own"


def test_clusters_are_of_normalised_keys_and_their_means_of_raw_ones():
    one, layers = spec(), some_layers(1)
    long = [(q, k * torch.linspace(1, 9, 120, dtype=torch.float64)[:, None]) for q, k in layers]
    (index,), (other,) = settled(one, layers), settled(one, long)
    assert members(index, 0, 0) == members(other, 0, 0)
    for c, tokens in enumerate(c for c in members(other, 0, 1)):
        found = other.keys[0, 1][other.counts[0, 1] > 0][c]
        torch.testing.assert_close(found, long[0][1][0, 1, tokens].mean(0), rtol=0, atol=TOLERANCE)


def test_a_quantile_leaves_out_at_most_its_share():
    weights = torch.tensor([[0.1, 0.2, 0.2, 0.4, 0.5]], dtype=torch.float64)
    counts = torch.tensor([[2, 3, 1, 0, 4]])
    found = [quantile(weights, counts, share).item() for share in (0.0, 0.19, 0.2, 0.5, 0.6, 0.99, 1.0)]
    assert found == [EVERYTHING, EVERYTHING, 0.1, 0.1, 0.2, 0.2, 0.5]


def test_it_does_not_run_where_it_would_read_everything():
    assert spec().runs(120) and spec(quantile=0.0, budget=10).runs(120) and spec(quantile=0.0, mass=0.9).runs(120)
    assert not spec(quantile=0.0).runs(120) and not spec(min_tokens=121).runs(120)
    assert spec(quantile=0.5).reads(121) == 121 - 54


def test_a_budget_takes_the_heaviest_clusters():
    layers = some_layers(1)
    everything = spec(quantile=0.0)
    (index,) = settled(everything, layers)
    query, kept = layers[0][0][:, :, -1:], [Segment(layers[0][1], layers[0][1], 120)]
    whole = everything.choose(query, index, kept, 120, 0.5)
    assert whole.counts.tolist() == [[108, 108]]
    few = spec(quantile=0.0, budget=10)
    choice = few.choose(query, index, kept, 120, 0.5)
    assert choice.counts.tolist() == [[10, 10]]
    best_first = index.ranked(query, 0.5).clusters
    for head in range(2):
        best = int(best_first[0, head, 0])
        tokens = [t for t, c in enumerate(index.of[0, head].tolist(), start=4) if c == best]
        assert set(tokens[:10]) <= set(choice.entries[0, head].tolist())


def test_two_levels_read_inside_of_coarse_clusters_that_pass():
    layers = some_layers()
    query = torch.randn(1, 4, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 2
    one, all_pass, few_pass = spec(), spec(coarse=5.0, coarse_quantile=0.0), spec(coarse=5.0, coarse_quantile=0.5)
    found = {}
    for name, which in (("one", one), ("all", all_pass), ("few", few_pass)):
        indexes = settled(which, layers)
        choices = [
            which.choose(query, index, [Segment(k, k, 120)], 120, 0.5)
            for index, (_, k) in zip(indexes, layers, strict=True)
        ]
        found[name] = [
            [choice.entries[0, head, : int(choice.counts[0, head])].tolist() for head in range(2)] for choice in choices
        ]
    assert found["one"] == found["all"], "a first threshold that everything passes is one level"
    assert found["one"] != found["few"]
    for index, (_, k), choice in zip(indexes, layers, found["few"], strict=True):
        assert index.threshold.shape == (1, 2, 2)
        for head in range(2):
            assert set(choice[head]) == coarse_by_hand(index, k[0, head], query[0, 2 * head : 2 * head + 2], head)


def coarse_by_hand(index, k, q, head: int) -> set[int]:
    """Clusters inside of coarse ones that pass; the others count by their coarse means."""
    fine, coarse = ({}, {})
    for token, cluster in enumerate(index.of[0, head].tolist(), start=index.low):
        fine.setdefault(cluster, []).append(token)
        coarse.setdefault(int(index.top[0, head, cluster]), []).append(token)
    passed = []
    for c, weight in zip(coarse, weights_by_hand(None, q, k, list(coarse.values()), 0.5).tolist(), strict=True):
        if math.log(weight) > index.threshold[0, 0, 1]:
            passed.append(c)
    inside = [c for c in fine if int(index.top[0, head, c]) in passed]
    others = [tokens for c, tokens in coarse.items() if c not in passed]
    own = weights_by_hand(None, q, k, [fine[c] for c in inside] + others, 0.5)[: len(inside)]
    return {t for c, w in zip(inside, own.log().tolist(), strict=True) if w > index.threshold[0, 0, 0] for t in fine[c]}


def test_more_coarse_clusters_than_clusters_are_refused():
    with pytest.raises(ConfigError, match="coarse: got 20.0, expected less than percent, 20.0"):
        spec(coarse=20.0)


def logits(model, text, cache=None, steps=(150,), mask=None):
    return read(model, text, cache or LongCtxCache(model), mask, steps)


@pytest.mark.parametrize("store", STORES, ids=str)
def test_every_store_in_a_model(store):
    dense = selecting_model(None, store)
    want = logits(dense, ids())
    exact = selecting_model("prefix_clusters", store, **{**FIELDS, "quantile": 1e-9})  # of 0 nothing would run
    torch.testing.assert_close(logits(exact, ids()), want, rtol=0, atol=1e-11)
    fewer = selecting_model("prefix_clusters", store, **FIELDS)
    got = logits(fewer, ids())
    assert (got - want)[:, 150:].abs().max() > 1e-2, "a control"
    torch.testing.assert_close(got[:, :150], want[:, :150], rtol=0, atol=1e-11)
    assert "retrieval heads read" in str(report(fewer)) and "prefix_clusters" not in str(report(fewer))
    if isinstance(store, str):
        full = selecting_model("prefix_clusters", **FIELDS)
        torch.testing.assert_close(got, logits(full, ids()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_however_the_text_is_cut(fields):
    model = selecting_model("prefix_clusters", **fields)
    once = logits(model, ids(320), steps=(290,))
    for steps in ((130, 160), (290, 7, 1, 9)):
        torch.testing.assert_close(logits(model, ids(320), steps=steps), once, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_a_left_padded_batch_is_its_sequences_alone(fields):
    assert_padded_as_alone(selecting_model("prefix_clusters", **fields), ids(170, 3))


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_crop_and_continue_is_as_never_cropped(fields):
    model = selecting_model("prefix_clusters", roles="retrieval", **fields)
    cache = LongCtxCache(model)
    want = logits(model, ids(), cache)
    for target in (180, 163, 150):
        cache.crop(target)
        torch.testing.assert_close(read(model, ids()[:, target:], cache), want[:, target:], rtol=0, atol=1e-11)


def test_a_prompt_cropped_before_it_ended_is_a_shorter_prompt():
    model = selecting_model("prefix_clusters", roles="retrieval", **FIELDS)
    cache = LongCtxCache(model)
    read(model, ids()[:, :150], cache, steps=(150,))
    cache.crop(149)
    text = torch.cat([ids()[:, :149], ids(300, seed=6)[:, 149:]], 1)
    got = read(model, text[:, 149:], cache, steps=(131,))
    torch.testing.assert_close(got, logits(model, text, steps=(280,))[:, 149:], rtol=0, atol=1e-11)


def test_too_few_queries_read_everything_and_say_so():
    dense = selecting_model(None, roles="retrieval")
    want = logits(dense, ids(150), steps=(130,))
    model = selecting_model("prefix_clusters", roles="retrieval", **FIELDS)
    cache = LongCtxCache(model)
    logits(model, ids(150), cache, steps=(130,))
    assert "too short or too few" not in str(report(model))
    cache.crop(60)
    torch.testing.assert_close(read(model, ids(150)[:, 60:], cache), want[:, 60:], rtol=0, atol=1e-11)
    assert "too short or too few" in " ".join(str(report(model)).split())


def test_forks_of_a_kept_prompt_share_its_clusters():
    model = selecting_model("prefix_clusters", roles="retrieval", **FIELDS)
    prompts = PromptCache(model)
    first, second = (prompts.prefill(ids(160)[0].tolist()).cache for _ in range(2))
    assert prompts.hits == 1
    indexes = [[part.index for part in cache.own[0].selections[0].parts.values()] for cache in (first, second)]
    one, two = (found[0] for found in indexes)
    assert one.threshold is not None and one.tokens == 159 and one.keys is two.keys and one.of is two.of
    question = ids(200, seed=7)[:, :20]
    text = torch.cat([ids(160), question], 1)
    fresh = logits(model, text, steps=(159,))
    for cache in (first, second):
        got = read(model, text[:, 159:], cache)
        torch.testing.assert_close(got, fresh[:, 159:], rtol=0, atol=1e-11)
    long = torch.cat([ids(160)[:, -1:], ids(300, seed=8)[:, :140]], 1)  # a question that is a prompt by its length
    third = prompts.prefill(ids(160)[0].tolist()).cache
    read(model, long, third, steps=(141,))
    assert next(iter(third.own[0].selections[0].parts.values())).index.of is one.of, "the prefix stays"


def index_of(cache):
    return next(iter(cache.own[0].selections[0].parts.values())).index


def test_a_kept_prompt_that_begins_like_another_has_clusters_of_its_own():
    """It goes on from the whole of the other one, or from a part of it."""
    model = selecting_model("prefix_clusters", roles="retrieval", **FIELDS)
    first, long, other = ids(160), ids(330, seed=8), ids(300, seed=9)
    for text in (torch.cat([first, long[:, :170]], 1), torch.cat([first[:, :90], other[:, :200]], 1)):
        prompts = PromptCache(model)
        old = index_of(prompts.prefill(first[0].tolist()).cache)
        cache = prompts.prefill(text[0].tolist()).cache
        assert prompts.hits == 1 and index_of(cache).tokens == text.shape[1] - 1 and old.tokens == 159
        fresh = PromptCache(model).prefill(text[0].tolist()).cache
        more = torch.cat([text[:, -1:], ids()[:, :9]], 1)
        torch.testing.assert_close(read(model, more, cache), read(model, more, fresh), rtol=0, atol=1e-11)
    prompts = PromptCache(model)
    prompts.prefill(first[0].tolist())
    short = torch.cat([first, long[:, :20]], 1)
    assert index_of(prompts.prefill(short[0].tolist()).cache).tokens == 159, "too little for another prefix"


def test_a_saved_cache_has_its_prefix(tmp_path):
    """Two levels: settled, padded, before it is settled, and cropped into the tokens that are always read."""
    model = selecting_model("prefix_clusters", **FIELDS, coarse=5.0, coarse_quantile=0.3)
    mask = torch.tensor([[int(j >= 200 - length) for j in range(200)] for length in (200, 170)])
    for name, text, own, read_first, target in (
        ("settled", ids(), None, 170, 170),
        ("cropped", ids(), None, 170, 147),
        ("waiting", ids(), None, 150, 150),
        ("padded", ids(200, 2) * mask, mask, 170, 170),
    ):
        cache = LongCtxCache(model)
        read(model, text[:, :read_first], cache, own, steps=(150,))
        cache.crop(target)
        cache.save(tmp_path / name)
        loaded = LongCtxCache.load(tmp_path / name, model)
        want = read(model, text[:, target:], cache, own)
        torch.testing.assert_close(read(model, text[:, target:], loaded, own), want, rtol=0, atol=1e-11)
        again = LongCtxCache(model)
        read(model, text[:, :target], again, own, steps=(target,))
        differs = (read(model, text[:, target:], again, own) - want).abs().max()
        assert (differs > 1e-3) == (name != "waiting"), "a control: another prefix is another choice"


def test_a_file_fits_the_selection_it_was_saved_with(tmp_path):
    made = selecting_model("prefix_clusters", **FIELDS)
    plain = selecting_model(None)
    for model in (made, plain):
        cache = LongCtxCache(model)
        logits(model, ids(), cache)
        cache.save(tmp_path / ("made" if model is made else "plain"))
    budget = selecting_model("prefix_clusters", **FIELDS, budget=40, refresh=4)
    assert LongCtxCache.load(tmp_path / "made", budget).seen == 200, "what decides how much is read may differ"
    bounds = selecting_model("page_bounds", page=8)
    assert LongCtxCache.load(tmp_path / "plain", bounds).seen == 200
    other = selecting_model("prefix_clusters", **{**FIELDS, "percent": 10.0})
    for name, model, said in (
        ("made", plain, 'another config, layer 0 .decode: .*"prefix_clusters".* there, null here'),
        ("made", bounds, "prefix_clusters.* there, null here"),
        ("plain", made, 'another config, layer 0 .decode: null there, .*"prefix_clusters"'),
        ("made", other, '"percent": 20.0.* there, .*"percent": 10.0'),
    ):
        with pytest.raises(CacheError, match=said):
            LongCtxCache.load(tmp_path / name, model)


@pytest.mark.parametrize("state", ["settled", "waiting"])
def test_a_file_is_believed_in_nothing(state, tmp_path):
    model = selecting_model("prefix_clusters", **FIELDS, coarse=5.0)
    cache = LongCtxCache(model)
    read(model, ids()[:, : 170 if state == "settled" else 150], cache, steps=(150,))
    cache.save(tmp_path / "true")
    forger = Forger(tmp_path / "true")
    kept = {place for place in places(forger.told["kept"]) if "selections" in place[:2]}
    wrong = [
        lambda tensors, told, p=p, v=v: put(told["kept"], p, v)
        for p in kept
        for v in others(at(forger.told["kept"], p))
    ]
    for name, tensor in forger.tensors.items():
        if ".selections." in name:
            for other in changed(tensor).values():
                wrong.append(lambda tensors, told, name=name, other=other: tensors.update({name: other}))
            if tensor.dtype == torch.int32:
                wrong.append(lambda tensors, told, name=name: tensors.update({name: tensors[name] + 99}))
                wrong.append(lambda tensors, told, name=name: tensors.update({name: tensors[name] - 99}))
    refused = 0
    for edit in wrong[:: max(1, len(wrong) // 150)]:
        try:
            loaded = LongCtxCache.load(forger.write(tmp_path / "false", edit), model)
        except CacheError:
            refused += 1
        else:
            read(model, ids()[:, loaded.seen :][:, :2], loaded)  # another prefix that can be
    assert refused > 100


def test_layers_that_an_observer_answered_for_are_not_known():
    model = selecting_model("prefix_clusters", roles="retrieval", **FIELDS)
    cache = LongCtxCache(model)

    def look(layer_idx, q, k, v, scaling, rows, compute):
        return compute("retrieval") if layer_idx == 1 else None

    with observe(model, look):
        model(ids()[:, :150], past_key_values=cache)
    read(model, ids()[:, 150:160], cache)
    known = [next(iter(layer.selections[0].parts.values())).index.threshold for layer in cache.own]
    assert [one is not None for one in known] == [True, False, True]


@pytest.mark.parametrize("coarse", [None, 5.0])
def test_nbytes_are_those_of_the_index(coarse):
    one, layers = spec(coarse=coarse), some_layers(1)
    (index,) = settled(one, layers)
    held = sum(tensor.numel() * tensor.element_size() for tensor in index.tensors())
    assert 2 * one.nbytes(121, 8, 8) == held
