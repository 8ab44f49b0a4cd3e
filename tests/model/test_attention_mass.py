"""attention_mass and token_attention: against eager matrices, over every store, in one forward and in many."""

from __future__ import annotations

import pytest
import torch
from helpers.caches import patched_tiny
from helpers.every_family import cases_of, stay_in_float64
from helpers.every_family import tiny_model as any_model
from helpers.store_cases import BY_DATA, CASES, ROUNDED, patched_case
from helpers.tiny import config_for, tiny_model

from hf_longctx import ConfigError, LongCtxCache, UnsupportedModeError, UnsupportedModelError, patch_model
from hf_longctx.model.attention_mass import attention_mass, token_attention

LENGTH = 90
CUTS = (20, 40, 1, 1, 27, 1)  # tokens of each forward


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def of_all(model, ids, cuts=(LENGTH,)) -> torch.Tensor:
    """Attention ``[layers, H, T, T]`` of all queries, read in pieces."""
    found, cache, past = {}, LongCtxCache(model), 0

    def take(layer, positions, weights):
        padded = torch.nn.functional.pad(weights, (0, LENGTH - weights.shape[-1]))
        found.setdefault(layer, []).append(padded)

    for cut in cuts:
        token_attention(model, ids[:, past : past + cut], slice(past, past + cut), take, cache=cache)
        past += cut
    return torch.stack([torch.cat(found[layer], 1) for layer in sorted(found)])


@torch.no_grad()
def matrices(model) -> torch.Tensor:
    """``[layers, H, T, T]`` as Transformers makes them of the text."""
    model.set_attn_implementation("eager")
    return torch.stack(model(text(), output_attentions=True).attentions)[:, 0]


@pytest.mark.quick
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_it_equals_the_matrices_of_transformers(family, monkeypatch):
    """Windows of the model's own (Mistral), a softcap (Gemma 2), sinks without a value (gpt-oss)."""
    stay_in_float64(monkeypatch)
    model = any_model(cases_of(family)[0])
    want = matrices(model)[..., :LENGTH]
    patch_model(model, config_for(model, "retrieval"))
    torch.testing.assert_close(of_all(model, text()), want, rtol=0, atol=1e-12)
    spans = [(0, 7), slice(7, 30), (20, 84)]
    mass = attention_mass(model, text(), slice(-6, None), spans)
    sums = torch.stack([want[:, :, -6:, a:b].sum(-1).mean(-1) for a, b in ((0, 7), (7, 30), (20, 84))], -1)
    torch.testing.assert_close(mass, sums, rtol=0, atol=1e-12)
    heads = [(1, 3), (0, 1)]
    some = attention_mass(model, text(), list(range(84, 90)), spans, heads)
    torch.testing.assert_close(some, torch.stack([sums[pair] for pair in heads]), rtol=0, atol=1e-12)
    wrong = attention_mass(model, text(), slice(-7, -1), spans)
    assert (wrong - sums).abs().max() > 1e-4, "a control: other queries give another mass"


@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_DATA | ROUNDED])
def test_a_text_in_pieces_gives_the_same_weights(case):
    model = patched_case(case, torch.float64)
    whole = of_all(model, text())
    torch.testing.assert_close(of_all(model, text(), CUTS), whole, rtol=0, atol=1e-12)
    other = of_all(model, text(), (LENGTH,)) - of_all(model, text(1), CUTS)
    assert other.abs().max() > 1e-3, "a control: another text gives other weights"


def test_streaming_heads_give_only_what_they_read():
    model = patched_tiny()
    found = of_all(model, text())
    roles = model.model.layers[0].self_attn.longctx_plan.letters
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (j <= i) & ((j < 4) | (i - j < 16))
    streaming = [2 * head + g for head, letter in enumerate(roles) if letter == "S" for g in (0, 1)]
    assert streaming and found[0, streaming][:, ~seen].abs().max() == 0
    assert found[0, streaming][:, seen].min() > 0
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_DATA])
def test_weights_times_values_are_the_attention(case, monkeypatch):
    """Over what is packed and what is on disk as well; a mean of dropped tokens is what is missing."""
    model = patched_case(case, torch.float64)
    values, outputs = {}, {}
    update = LongCtxCache.update

    def watched(cache, k, v, layer_idx, *args, **kwargs):
        values[layer_idx] = torch.cat([values.get(layer_idx, v[:, :, :0]), v], 2)
        return update(cache, k, v, layer_idx, *args, **kwargs)

    monkeypatch.setattr(LongCtxCache, "update", watched)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, i=index: outputs.update({i: given[0]}))
    found = {}
    token_attention(model, text(), slice(-9, None), lambda layer, _, weights: found.update({layer: weights}))
    estimates = any(role.store.estimates for role in model.model.layers[0].self_attn.longctx_plan.filled)
    for layer, weights in found.items():
        made = weights @ values[layer][0].repeat_interleave(2, 0)
        out = outputs[layer][0, -9:].unflatten(-1, (8, -1)).transpose(0, 1)
        whole = (weights.sum(-1) > 1 - 1e-9).all(-1)
        assert whole.any() and (estimates or whole.all())
        # What is packed is rounded, the values that are compared with are not.
        torch.testing.assert_close(made[whole], out[whole], rtol=0, atol=0.2 if case in ROUNDED else 1e-12)


def test_a_cache_of_before_is_read_and_grows():
    model = patched_tiny()
    cache = LongCtxCache(model)
    ids = text()
    token_attention(model, ids[:, :80], [79], lambda *_: None, cache=cache)
    fork = cache.fork()
    mass = attention_mass(model, ids[0, 80:], slice(80, None), [(0, 40), (85, 90)], cache=fork)
    assert (cache.seen, fork.seen) == (80, 90)
    torch.testing.assert_close(
        mass, attention_mass(model, ids, slice(80, None), [(0, 40), (85, 90)]), rtol=0, atol=1e-12
    )


def test_what_cannot_be_is_refused():
    model = patched_tiny()
    ids = text()
    for queries, said in ((slice(90, 95), "expected positions"), ([], "expected positions"), ([3, 90], "0 to 89")):
        with pytest.raises(ConfigError, match=said):
            attention_mass(model, ids, queries, [(0, 3)])
    for span in ((3, 3), (0, 91), (-2, 5), slice(None, 4)):
        with pytest.raises(ConfigError, match="spans: got"):
            attention_mass(model, ids, [5], [span])
    with pytest.raises(ConfigError, match="heads: got"):
        attention_mass(model, ids, [5], [(0, 3)], heads=[(0, 8)])
    with pytest.raises(ConfigError, match="no tokens"):
        attention_mass(model, ids[:, :0], [5], [])
    with pytest.raises(UnsupportedModelError, match="call patch_model"):
        attention_mass(tiny_model(), ids, [5], [(0, 3)])
    with pytest.raises(UnsupportedModeError, match="eval mode"):
        attention_mass(model.train(), ids, [5], [(0, 3)])
    model.eval()
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(UnsupportedModeError, match="holds 2"):
        attention_mass(model, ids, [95], [(0, 3)], cache=cache)


@pytest.mark.parametrize("case", sorted(BY_DATA))
def test_evicted_tokens_are_refused_in_words(case):
    with pytest.raises(UnsupportedModeError, match=r"observe\(\)"):
        attention_mass(patched_case(case, torch.float64), text(), [5], [(0, 3)])
