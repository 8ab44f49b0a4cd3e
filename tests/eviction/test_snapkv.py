"""``score: snapkv``: the rule written out, and the tokens that kvpress keeps by it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.config_cases import refused
from helpers.seen import Prompt
from helpers.tiny import config_for
from torch.nn.functional import avg_pool1d
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longctx import observe, patch_model
from hf_longctx.eviction.base import Seen
from hf_longctx.eviction.snapkv import Snapkv
from hf_longctx.layout.scores import Scores

KVPRESS = json.loads((Path(__file__).parent / "kept_by_kvpress.json").read_text("utf-8"))
TOKENS = 200


@cache
def toy() -> list[tuple[torch.Tensor, ...]]:
    """q, k, v of the layers of the model of which kvpress's kept tokens are stored."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**KVPRESS["config"])).eval()
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    sums = KVPRESS["checksums"]
    assert ids[0, :8].tolist() == sums["ids_first_8"]
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert model.get_parameter(name).sum().item() == pytest.approx(sums[name], abs=1e-3)
    found = []
    patch_model(model, config_for(model, "retrieval"))
    with torch.no_grad(), observe(model, lambda layer, q, k, v, *rest: found.append((q, k, v))):
        model(ids)
    assert [k.sum().item() for _, k, _ in found] == pytest.approx([sums["layer0_keys_sum"], sums["layer1_keys_sum"]])
    return found


@pytest.mark.parametrize("setting", KVPRESS["settings"], ids=lambda one: f"{one['window']}-{one['pool']}")
def test_kvpress_keeps_the_same_tokens(setting):
    window = setting["window"]
    rule, other = Snapkv(window=window, pool=setting["pool"]), Snapkv(window=window, pool=1)
    for (q, k, v), kept in zip(toy(), setting["kept"], strict=True):
        seen = Seen(k, v, torch.arange(TOKENS), q[:, :, -window:], TOKENS, Scores(k.shape[-1] ** -0.5))
        for head, want in enumerate(kept):
            assert want[-window:] == list(range(TOKENS - window, TOKENS))
            assert best(rule.score(seen)[0, head], window, len(want)) == want
            assert best(other.score(seen)[0, head], window, len(want)) != want


def best(scores: torch.Tensor, window: int, count: int) -> list[int]:
    """The last tokens and the highest of the others, ``count`` in all, in order."""
    order = scores[:-window].sort(descending=True, stable=True).indices[: count - window]
    return sorted([*order.tolist(), *range(len(scores) - window, len(scores))])


@pytest.mark.quick
@pytest.mark.parametrize("pool", [1, 5])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_it_is_the_mean_of_the_last_weights_and_their_neighbours(pool, pooling):
    prompt = Prompt.random()
    found = prompt.score(Snapkv(window=8, pool=pool, pooling=pooling))
    votes = prompt.weights()[:, :, 32:, :32].mean(2)
    if pooling == "avg":
        votes = avg_pool1d(votes, pool, stride=1, padding=pool // 2)
    else:
        near = range(-(pool // 2), pool // 2 + 1)
        votes = torch.stack([votes[..., [min(max(i + j, 0), 31) for i in range(32)]] for j in near]).amax(0)
    torch.testing.assert_close(found[..., :32], prompt.grouped(votes), rtol=0, atol=1e-12)
    assert not found[..., 32:].any()


def test_a_prompt_of_the_window_alone_has_no_votes():
    assert not Prompt.random(8).score(Snapkv(window=8)).any()
    assert Prompt.random(9).score(Snapkv(window=8)).count_nonzero() == 4


def test_a_neighbourhood_has_a_middle():
    refused(lambda: Snapkv(pool=4), "pool: got 4, expected an odd number (tokens).")
