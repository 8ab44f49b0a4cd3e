"""``select: tree`` finds tokens by halving chunks, of which it reads the middle tokens' keys alone."""

from __future__ import annotations

import pytest
import torch
from helpers.decode_layer import (
    OUTSIDE,
    SMALL,
    assert_rows_as_alone,
    assert_same,
    choose,
    decoded,
    dense,
    outside,
    over,
    tokens,
)

from hf_longctx.decode.tree import Tree

EVERY = {"refresh": 1}


def search(q, k, entries: list[list[int]], count: int, middles: set[int]) -> list[list[int]]:
    """The ``count`` entries (each its positions) that survive, for one KV head: q ``[G, D]``, k ``[S, D]``."""

    def score(chunk: list[list[int]]) -> float:
        inside = [position for entry in chunk for position in entry]
        middles.add(inside[len(inside) // 2])
        return max(float(head @ k[inside[len(inside) // 2]]) for head in q)

    def survivors(chunks: list) -> list:
        chunks = [one for one in chunks if one]
        scores = [score(one) for one in chunks]
        kept = sorted(sorted(range(len(chunks)), key=lambda at: (-scores[at], at))[:count])
        if all(len(one) == 1 for one in chunks):
            return [chunks[at][0] for at in kept]
        halves = [(chunks[at][: (len(chunks[at]) + 1) // 2], chunks[at][(len(chunks[at]) + 1) // 2 :]) for at in kept]
        return survivors([half for pair in halves for half in pair])

    cut = [at * len(entries) // (2 * count) for at in range(2 * count + 1)]
    return survivors([entries[a:b] for a, b in zip(cut, cut[1:], strict=False)])


def entries_of(spec: Tree, position: int) -> tuple[list[list[int]], int]:
    """The entries that may be chosen, each its positions, and the first position after them."""
    low, high = -(-spec.sink // spec.chunk), (position + 1 - spec.recent) // spec.chunk
    each = [list(range(at * spec.chunk, (at + 1) * spec.chunk)) for at in range(low, high)]
    return each, high * spec.chunk


def loop(spec: Tree, qkv, prompt: int) -> list[list[set[int]]]:
    """The positions that each token after the prompt reads, by KV head."""
    q, k, _ = qkv
    group = q.shape[1] // k.shape[1]
    last, chosen, edge = None, [], 0
    read = []
    for position in range(prompt, q.shape[2]):
        entries, high = entries_of(spec, position)
        if len(entries) <= spec.budget // spec.chunk:
            read.append([set(range(position + 1))] * k.shape[1])
            continue
        if last is None or last // spec.refresh != position // spec.refresh:
            last, edge, chosen = position, high, []
            for head in range(k.shape[1]):
                own = q[0, head * group : (head + 1) * group, position]
                found = search(own, k[0, head], entries, spec.budget // spec.chunk, set())
                chosen.append({at for entry in found for at in entry})
        sinks = set(range(-(-spec.sink // spec.chunk) * spec.chunk))
        read.append([one | sinks | outside(spec, position, edge) for one in chosen])
    return read


@pytest.mark.parametrize("more", [1, 7, 9, 63, 130])  # tokens between sinks and newest ones
@pytest.mark.parametrize(
    "fields", [{"budget": 8, **EVERY}, {"budget": 8, "chunk": 4}, {"budget": 6, "chunk": 3, **EVERY}, {"budget": 8}]
)
def test_reads_what_the_recursion_says(more, fields):
    spec = Tree(**SMALL, **fields)
    prompt = OUTSIDE + more
    qkv = tokens(prompt + 20)
    out, counts = decoded(spec, qkv, prompt)
    read = loop(spec, qkv, prompt)
    assert_same(out, over(qkv, prompt, read))
    assert (counts.reused > 0) == (spec.refresh > 1)


@pytest.mark.parametrize("wrong", [{"budget": 10}, {"chunk": 1}, {"refresh": 2}])
def test_the_recursion_can_differ(wrong):
    fields = {**SMALL, "budget": 8, "refresh": 1}
    qkv = tokens(100)
    out, _ = decoded(Tree(**fields), qkv, 80)
    assert (out - over(qkv, 80, loop(Tree(**{**fields, **wrong}), qkv, 80))).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_every_number_of_entries_and_budget(chunk):
    for total in range(2, 24):
        q, k, _ = tokens((total + 1) * chunk + 8, heads=2, kv_heads=1)
        for count in range(1, total + 1):
            spec = Tree(sink=chunk, recent=8, budget=count * chunk, chunk=chunk)
            entries, _ = entries_of(spec, k.shape[2] - 1)
            assert len(entries) == total
            found = choose(spec, q[:, :, -1:], k).entries[0, 0].tolist()
            assert found == [one[0] // chunk for one in search(q[0, :, -1], k[0, 0], entries, count, set())]
            assert len(set(found)) == count and found == sorted(found)


@pytest.mark.parametrize("fields", [{"budget": 100}, {"share": 1.0}, {"budget": 60, "chunk": 4}])
def test_its_limits_are_dense(fields):
    qkv = tokens(70)
    assert_same(decoded(Tree(**SMALL, **fields), qkv, 40)[0], dense(qkv, 40))


def test_other_keys_than_those_of_middle_tokens_are_not_touched():
    q, k, _ = tokens(1000, kv_heads=1)
    spec = Tree(**SMALL, budget=16)
    entries, _ = entries_of(spec, 999)
    middles: set[int] = set()
    right = search(q[0, :, -1], k[0, 0], entries, 8, middles)
    assert len(middles) < 100
    other = torch.ones(1000, dtype=torch.bool)
    other[sorted(middles)] = False
    poisoned = k.clone()
    poisoned[:, :, other] = float("nan")
    assert choose(spec, q[:, :, -1:], poisoned).entries[0, 0].tolist() == [one[0] // 2 for one in right]
    poisoned[:, :, right[-1][1]] = float("nan")  # the middle of one that was chosen
    assert choose(spec, q[:, :, -1:], poisoned).entries[0, 0].tolist() != [one[0] // 2 for one in right]


@pytest.mark.parametrize("at", [4, 100, 333, 780])
def test_a_spike_wider_than_a_chunk_is_found_and_a_needle_is_not(at):
    """16 chunks of 62 tokens are scored first: 124 tokens hold one of them as a whole."""
    q, k, _ = tokens(1000, heads=2, kv_heads=1)
    spec = Tree(**SMALL, budget=16)
    q[:, 1] = 0
    k[:, :, at : at + 124] = 10 * q[:, :1, -1:]
    found = choose(spec, q[:, :, -1:], k).entries[0, 0] * 2
    assert bool(((found >= at - 1) & (found < at + 124)).all())
    _, needle, _ = tokens(1000, kv_heads=1)
    needle[:, :, at] = 10 * q[:, 0, -1:]
    found = choose(spec, q[:, :, -1:], needle).entries[0, 0] * 2
    assert at not in found and at - 1 not in found


def test_equal_scores_go_to_the_first_chunks():
    q, k, _ = tokens(80)
    found = choose(Tree(**SMALL, budget=8), q[:, :, -1:] * 0, k).entries
    assert found.tolist() == [[[2, 3, 4, 5]] * 2]


def test_a_mass_keeps_the_best_of_those_found():
    q, k, _ = tokens(500, heads=2)
    whole = choose(Tree(**SMALL, budget=16, chunk=1), q[:, :, -1:], k).entries[0, :, :, None].long()
    few = choose(Tree(**SMALL, budget=16, chunk=1, mass=1e-6), q[:, :, -1:], k)
    scores = (k[0].take_along_dim(whole, 1) * q[0, :, -1:]).sum(2)
    assert few.counts.tolist() == [[1, 1]]
    assert few.entries[0, :, 0].tolist() == whole[:, :, 0].gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()


@pytest.mark.parametrize("total", [9, 15, 17, 100])
def test_what_is_no_number_still_gives_entries_that_exist(total):
    q, k, _ = tokens(2 * total + OUTSIDE)
    found = choose(Tree(**SMALL, budget=16), q[:, :, -1:] * float("nan"), k).entries
    for entries in found.flatten(0, 1).tolist():
        assert len(set(entries)) == 8 and min(entries) >= 2 and max(entries) < total + 2


@pytest.mark.parametrize("fields", [EVERY, {"similar": 0.1, "refresh": 32, "chunk": 4}])
def test_padded_sequences_as_alone(fields):
    assert_rows_as_alone(Tree(**SMALL, budget=8, **fields), (0, 3, 21), 60, 85)
