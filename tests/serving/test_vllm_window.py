"""The streaming rule over vLLM's blocks: equal to the mask in float64, and only slots that a request owns are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_longctx.serving.vllm import window
from hf_longctx.serving.vllm.window import Rule

BLOCK = 8
HEADS, GROUP, DIM = 2, 3, 4
LENGTHS = (1, 7, 61, 150)
CUTS = {"one shot": 1000, "chunks": 37, "tokens": 1}
RULES = (Rule(5, 50), Rule(5, 1), Rule(8, 24), Rule(20, 9), Rule(1, 200))


class Requests:
    """Requests whose tokens arrive in steps; their blocks are freed as `SinkWindowManager` frees them.

    Everything but a request's own, still owned slots is NaN.
    """

    def __init__(self, lengths: tuple[int, ...]):
        self.q = [torch.randn(n, HEADS * GROUP, DIM, dtype=torch.float64) for n in lengths]
        self.kv = [torch.randn(2, n, HEADS, DIM, dtype=torch.float64) for n in lengths]
        self.lengths = lengths
        per = max(lengths) // BLOCK + 1
        self.table = (torch.randperm(per * len(lengths)) + 1).view(len(lengths), per)  # block 0 is nobody's
        self.cache = torch.full((per * len(lengths) + 1, HEADS, BLOCK, 2 * DIM), float("nan"), dtype=torch.float64)

    def free(self, request: int, done: int, rule: Rule) -> None:
        gap = slice(-(-rule.sink // BLOCK), max(0, done - rule.recent + 1) // BLOCK)
        self.cache[self.table[request, gap]] = float("nan")
        self.table[request, gap] = 0
        self.cache[0] = float("nan")

    def step(self, new: list[tuple[int, int, int]], rule: Rule) -> list[Tensor]:
        """Outputs of (request, tokens before, new tokens) in one step."""
        q = torch.cat([self.q[r][done : done + n] for r, done, n in new])
        k, v = torch.cat([self.kv[r][:, done : done + n] for r, done, n in new], 1)
        at = torch.cat([torch.arange(done, done + n) for _, done, n in new])
        rows = self.table[torch.cat([torch.full((n,), r) for r, _, n in new]), at // BLOCK]
        window.write(self.cache, k, v, rows * BLOCK + at % BLOCK)
        counts = torch.tensor([0, *(n for _, _, n in new)])
        lengths = torch.tensor([done + n for _, done, n in new])
        table = self.table[torch.tensor([r for r, _, _ in new])].int()
        out = torch.full_like(q, float("nan"))
        window.attend(q, self.cache, window.plan(counts.cumsum(0).int(), lengths, table, BLOCK, rule), 0.5, out)
        return list(out.split([n for _, _, n in new]))

    def outputs(self, cut: int, rule: Rule) -> list[Tensor]:
        """Outputs of all tokens; requests of different lengths leave at different steps."""
        parts: list[list[Tensor]] = [[] for _ in self.lengths]
        for done in range(0, max(self.lengths), cut):
            new = [(r, done, min(cut, n - done)) for r, n in enumerate(self.lengths) if done < n]
            for request, _, _ in new:
                self.free(request, done, rule)
            for (request, _, _), out in zip(new, self.step(new, rule), strict=True):
                parts[request].append(out)
        return [torch.cat(one) for one in parts]

    def masked(self, rule: Rule) -> list[Tensor]:
        """The same by a mask over all tokens."""
        found = []
        for q, (k, v) in zip(self.q, self.kv, strict=True):
            i, j = torch.arange(len(q))[:, None], torch.arange(len(q))
            seen = (j <= i) & ((j < rule.sink) | (i - j < rule.recent))
            k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
            scores = (torch.einsum("qhd,khd->hqk", q, k) * 0.5).masked_fill(~seen, -torch.inf)
            found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        return found


def error(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("queries", [16, 256])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_is_the_mask(rule, cut, queries, monkeypatch):
    monkeypatch.setattr(window, "QUERIES", queries)
    requests = Requests(LENGTHS)
    assert error(requests.outputs(CUTS[cut], rule), requests.masked(rule)) <= 1e-12


@pytest.mark.quick
@pytest.mark.parametrize("other", [Rule(5, 49), Rule(5, 51), Rule(4, 50), Rule(6, 50)], ids=str)
def test_a_rule_off_by_one_is_seen(other):
    requests = Requests(LENGTHS)
    mine = requests.outputs(37, Rule(5, 50))
    assert error(mine, requests.masked(Rule(5, 50))) <= 1e-12
    assert error(mine, requests.masked(other)) > 1e-3


def test_a_freed_block_that_is_needed_is_seen():
    """A control of the NaN: blocks freed for a window that is 8 tokens shorter."""
    requests = Requests((150,))
    requests.step([(0, 0, 149)], Rule(5, 50))
    requests.free(0, 149, Rule(5, 42))
    assert requests.step([(0, 149, 1)], Rule(5, 50))[0].isnan().any()


def test_padding_of_a_step_is_not_written():
    cache = torch.zeros(2, HEADS, BLOCK, 2 * DIM)
    k, v = torch.ones(3, HEADS, DIM), torch.full((3, HEADS, DIM), 2.0)
    window.write(cache, k, v, torch.tensor([BLOCK + 3, -1]))
    assert cache.count_nonzero() == HEADS * 2 * DIM
    assert cache[1, :, 3].tolist() == [[1.0] * DIM + [2.0] * DIM] * HEADS
