"""``select: clusters``: the best clusters are read, the next best ones are estimated."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers.recall import retrieval_heads
from helpers.selecting import SMALL, assert_padded_as_alone, attended, read, selecting_model

from hf_longctx import ConfigError, LongCtxCache, report
from hf_longctx.decode import _growing, _kmeans
from hf_longctx.decode.clusters import Clusters
from hf_longctx.layout.segments import Segment

KERNELS = ("auto", "reference", "cpu")
STORES = ("full", {"store": "quantized", "bits": 8}, "offloaded", "offloaded_disk")
SHORT = {"segment": 64, "every": 16, "per": 4, "iterations": 3}
EXACT = {**SHORT, "per": 1, "iterations": 0, "budget": 1, "estimate": 1.0}  # one mean for each token
TOLERANCE = 1e-12
EVERY = [pytest.param(one, marks=pytest.mark.slow if at else ()) for at, one in enumerate(Clusters.cases)]


def spec(**fields) -> Clusters:
    return Clusters(**{**SMALL, **SHORT, **fields})


def some_kv(tokens: int, heads: int = 2, batch: int = 1, dim: int = 8, group: int = 2):
    torch.manual_seed(1)
    q = torch.randn(batch, heads * group, 1, dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, heads, tokens, dim, dtype=torch.float64)
    return 2 * q, k, v


def chosen(one: Clusters, q, k, v, scale: float = 0.5):
    index = one.new_index()
    return one.choose(q, index, [Segment(k, v, k.shape[2])], k.shape[2] - 1, scale), index


def by_hand(one: Clusters, q, k, v, scale: float):
    """(tokens read, {cluster: tokens that its mean stands for}), head by head, and what the heads give."""
    found = []
    outs = []
    position = k.shape[2] - 1
    edge = (position + 1 - one.recent) // one.every * one.every
    group = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        clusters = []
        for low, high in ranges(one, edge):
            keys = k[0, head, low:high]
            count = -(-(high - low) // one.per)
            of = lloyd(keys, count, one.iterations)
            clusters += [[low + t for t in range(high - low) if of[t] == c] for c in range(count)]
        score = lambda tokens, h=head: max(  # noqa: E731
            float(q[0, h * group + g, 0] @ k[0, h, tokens].mean(0)) * scale for g in range(group)
        )
        ranked = sorted((c for c in clusters if c), key=lambda tokens: -score(tokens))
        left, tokens, means = one.width(position + 1), [], []
        for cluster in ranked:
            taken = min(left, len(cluster))
            tokens += cluster[:taken]
            left -= taken
            if taken < len(cluster) and len(means) < math.ceil(one.estimate * len(clusters)):
                means.append((cluster, len(cluster) - taken))
        every = [*range(one.sink), *sorted(tokens), *range(edge, position + 1)]
        for g in range(group):
            query = q[0, head * group + g, 0]
            scores = [float(query @ k[0, head, t]) * scale for t in every]
            scores += [float(query @ k[0, head, c].mean(0)) * scale + math.log(n) for c, n in means]
            values = torch.stack([v[0, head, t] for t in every] + [v[0, head, c].mean(0) for c, _ in means])
            outs.append(torch.tensor(scores, dtype=torch.float64).softmax(0) @ values)
        found.append(sorted(tokens))
    return found, torch.stack(outs)[None, :, None]


def ranges(one: Clusters, edge: int) -> list[tuple[int, int]]:
    """What is clustered together: whole segments, then batches, without the sinks."""
    found = [(low, low + one.segment) for low in range(0, edge - one.segment + 1, one.segment)]
    rest = found[-1][1] if found else 0
    found += [(low, low + one.every) for low in range(rest, edge, one.every)]
    return [(max(low, one.sink), high) for low, high in found if high > one.sink]


def lloyd(keys, count: int, iterations: int) -> list[int]:
    centres = [keys[i * len(keys) // count] for i in range(count)]
    nearest = lambda: [min(range(count), key=lambda c: float((key - centres[c]).square().sum())) for key in keys]  # noqa: E731
    for _ in range(iterations):
        of = nearest()
        for c in range(count):
            if members := [t for t in range(len(keys)) if of[t] == c]:
                centres[c] = keys[members].mean(0)
    return nearest()


@pytest.mark.parametrize(
    "fields",
    [{"budget": 24}, {"budget": 30, "estimate": 0.0}, {"share": 0.2, "estimate": 1.0}, {"budget": 1, "per": 16}],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_definition(fields, kernel):
    one, (q, k, v) = spec(**fields), some_kv(187)
    tokens, out = by_hand(one, q, k, v, 0.5)
    assert chosen(one, q, k, v)[0].entries[0].tolist() == tokens
    torch.testing.assert_close(attended(one, q, k, v, 0.5, kernel), out, rtol=0, atol=TOLERANCE)
    other = by_hand(spec(**{**fields, "iterations": 0}), q, k, v, 0.5)[1]
    assert (other - out).abs().max() > 1e-3, "a control: other clusters give another output"


@pytest.mark.parametrize("kernel", KERNELS)
def test_clusters_of_one_token_with_everything_estimated_are_dense(kernel):
    q, k, v = some_kv(187)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    dense = (q @ keys.transpose(2, 3) / 2).softmax(-1) @ values
    torch.testing.assert_close(attended(spec(**EXACT), q, k, v, 0.5, kernel), dense, rtol=0, atol=TOLERANCE)
    fewer = attended(spec(**{**EXACT, "estimate": 0.5}), q, k, v, 0.5, kernel)
    assert (fewer - dense).abs().max() > 1e-4, "a control"


def test_all_clusters_read_are_all_tokens():
    q, k, v = some_kv(187)
    one = spec(budget=187)
    assert not one.runs(187) and spec(budget=100).runs(187)
    choice, _ = chosen(one, q, k, v)
    assert choice.entries.tolist() == [[list(range(4, 160))] * 2]
    assert (choice.estimate.bias == -math.inf).all(), "nothing is left to be estimated"
    torch.testing.assert_close(attended(one, q, k, v, 0.5), attended(spec(**EXACT), q, k, v, 0.5), rtol=0, atol=1e-12)


def test_each_cluster_says_what_it_has():
    q, k, v = some_kv(187, batch=2)
    _, index = chosen(spec(), q, k, v)
    counts, order = index.counts, torch.cat(index.order.views(), 2)[..., 0].long()
    assert order.sort(-1).values.tolist() == [[list(range(4, 160))] * 2] * 2
    assert (counts.sum(-1) == 156).all()
    for row in range(2):
        for head in range(2):
            begin = 0
            for at, count in enumerate(counts[row, head].tolist()):
                own = order[row, head, begin : begin + count]
                begin += count
                if count:
                    for table, x in ((index.keys, k), (index.values, v)):
                        mean = torch.cat(table.views(), 2)[row, head, at]
                        torch.testing.assert_close(mean, x[row, head, own].mean(0), rtol=0, atol=TOLERANCE)


def test_equal_keys_go_to_the_first_cluster_and_the_lowest_tokens():
    q, _, v = some_kv(187)
    k = torch.ones(1, 2, 187, 8, dtype=torch.float64)
    choice, index = chosen(spec(budget=10, segment=16), q, k, v)
    assert index.counts[0, 0].tolist()[:7] == [12, 0, 0, 16, 0, 0, 0]
    assert choice.entries.tolist() == [[list(range(4, 14))] * 2]


def test_less_mass_reads_fewer_tokens():
    q, k, v = some_kv(187)
    counts = [chosen(spec(budget=100, mass=mass), q, k, v)[0].counts for mass in (0.1, 0.5, 0.9, 1.0)]
    assert all((a <= b).all() for a, b in zip(counts, counts[1:], strict=False))
    assert (counts[0] < 20).all() and (counts[0] > 0).all() and (counts[3] == 100).all()


def test_sums_by_products_are_those_of_the_processor():
    q, k, _ = some_kv(187)
    of = _kmeans.clustered(k, 20, 2)
    counts = _kmeans.sizes(of, 20)
    summed = _kmeans._summed(k, of, 20)
    torch.testing.assert_close(summed, _kmeans.means(k, of, counts) * counts[..., None], rtol=0, atol=TOLERANCE)


def test_a_batch_has_to_fill_segments():
    with pytest.raises(ConfigError, match="every: got 24, expected a number that divides segment, 64"):
        spec(every=24)


def test_nbytes_are_those_of_the_index():
    q, k, v = some_kv(187)
    one = spec(budget=10)
    _, index = chosen(one, q, k, v)
    held = sum(tensor.untyped_storage().nbytes() for tensor in index.tensors())
    assert 2 * one.nbytes(187, 8, 8) == held
    assert one.nbytes(10, 8, 8) == 0


@functools.cache
def documents(name: str):
    return retrieval_heads(2048, 0, name)


def recalls(one: Clusters, name: str, random: bool = False) -> float:
    """Which share of the 32 keys with the highest scores is read by some of the last queries of a document."""
    found = []
    make = torch.Generator().manual_seed(0)
    for q, k, scale in documents(name):
        index = one.new_index()
        for position in range(1984, 2048, 8):
            query, own = q[:, :, position : position + 1], k[:, :, : position + 1]
            choice = one.choose(query, index, [Segment(own, own, position + 1)], position, scale)
            entries = choice.entries.long()
            if random:
                places = torch.rand(1, k.shape[1], choice.high - choice.low, generator=make)
                entries = places.topk(entries.shape[2]).indices + choice.low
            scores = (query[:, :, 0].unflatten(1, (k.shape[1], -1)) @ own.transpose(2, 3)).amax(2)
            best = scores[..., choice.low : choice.high].topk(32).indices + choice.low
            hit = torch.zeros(1, k.shape[1], 2048).scatter_(2, entries, 1.0)
            found.append(hit.gather(2, best).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-qwen3"])
def test_recall_of_the_best_keys_of_trained_heads(name):
    sizes = {"segment": 2048, "every": 512, "recent": 64, "budget": 200}
    assert recalls(spec(**sizes, per=16), name) > 0.78
    assert recalls(spec(**sizes, per=4), name) > 0.92
    assert recalls(spec(**sizes, per=16), name, random=True) < 0.2, "a control: a tenth of the tokens"


@functools.cache
def ids(tokens: int = 160, batch: int = 1):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("store", STORES, ids=str)
def test_every_store_in_a_model(store):
    dense = selecting_model(None, store)
    want = read(dense, ids(), LongCtxCache(dense), steps=(120,))
    exact = selecting_model("clusters", store, **EXACT)
    torch.testing.assert_close(read(exact, ids(), LongCtxCache(exact), steps=(120,)), want, rtol=0, atol=1e-11)
    fewer = selecting_model("clusters", store, **{**SHORT, "budget": 16})
    got = read(fewer, ids(), LongCtxCache(fewer), steps=(120,))
    assert (got - want)[:, 120:].abs().max() > 1e-2, "a control"
    assert "retrieval heads read" in str(report(fewer))
    if isinstance(store, str):  # and the same of all that keep every key as it is
        full = selecting_model("clusters", **{**SHORT, "budget": 16})
        torch.testing.assert_close(got, read(full, ids(), LongCtxCache(full), steps=(120,)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_however_the_text_is_cut(fields):
    model = selecting_model("clusters", **fields)
    once = read(model, ids(310), LongCtxCache(model), steps=(290,))
    for steps in ((130, 160), (290, 7, 1, 9)):
        parts = read(model, ids(310), LongCtxCache(model), steps=steps)
        torch.testing.assert_close(parts, once, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_a_left_padded_batch_is_its_sequences_alone(fields):
    assert_padded_as_alone(selecting_model("clusters", **fields), ids(170, 3))


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_crop_and_continue_is_as_never_cropped(fields):
    """Over the end of a segment, which is clustered anew when it is whole, and back."""
    model = selecting_model("clusters", roles="retrieval", **fields)
    cache = LongCtxCache(model)
    want = read(model, ids(220), cache, steps=(130,))
    for target in (201, 163, 140):
        cache.crop(target)
        got = read(model, ids(220)[:, target:], cache)
        torch.testing.assert_close(got, want[:, target:], rtol=0, atol=1e-11)
    other = (ids(220) + 1) % 90 + 3
    cache.crop(140)
    changed = read(model, other[:, 140:], cache)
    fresh = read(model, torch.cat([ids(220)[:, :140], other[:, 140:]], 1), LongCtxCache(model), steps=(130,))
    torch.testing.assert_close(changed, fresh[:, 140:], rtol=0, atol=1e-11)


def test_forks_share_the_clusters_they_had(monkeypatch):
    monkeypatch.setattr(_growing, "SPARE", 1)  # fewer entries than that are copied
    model = selecting_model("clusters", roles="retrieval", **SHORT, budget=16, refresh=4)
    first = LongCtxCache(model)
    want = read(model, ids(220), first, steps=(130,))
    cache = LongCtxCache(model)
    read(model, ids(220)[:, :170], cache, steps=(130,))
    fork = cache.fork()
    shared = {tensor.data_ptr() for tensor in fork.own[0].selections[0].tensors()}
    assert shared and shared <= {tensor.data_ptr() for tensor in cache.own[0].selections[0].tensors()}
    other = (ids(220) + 1) % 90 + 3
    read(model, other[:, 170:], fork)
    torch.testing.assert_close(read(model, ids(220)[:, 170:], cache), want[:, 170:], rtol=0, atol=1e-11)


def test_a_loaded_cache_has_the_same_clusters(tmp_path):
    model = selecting_model("clusters", **SHORT, budget=16)
    cache = LongCtxCache(model)
    read(model, ids(220)[:, :170], cache, steps=(130,))
    cache.save(tmp_path / "cache")
    loaded = LongCtxCache.load(tmp_path / "cache", model)
    torch.testing.assert_close(
        read(model, ids(220)[:, 170:], loaded), read(model, ids(220)[:, 170:], cache), rtol=0, atol=1e-11
    )


def test_what_is_remembered_is_small():
    model = selecting_model("clusters", roles="retrieval", **SHORT, budget=4, refresh=2)
    cache = LongCtxCache(model)
    read(model, ids(220), cache, steps=(130,))
    selection = cache.own[0].selections[0]
    choices = [part.choices for part in selection.parts.values()]
    assert len(choices[0]) > 10 and all(one.chosen.estimate is None for one in choices[0])
