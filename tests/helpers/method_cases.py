"""Random documents for tiny random models, and scores made from eager attention matrices."""

from __future__ import annotations

import numpy as np
import torch

from helpers.tiny import config_for
from hf_longctx import patched
from hf_longctx.identification.methods.base import HeadProbe
from hf_longctx.tasks.documents import Document


class Noise:
    """Documents for the 97 tokens of the tiny random models."""

    facts = 2
    haystack = None
    null = np.array([50, 60, 70, 80, 90])

    def repeat(self, before):
        return np.array([*before, 7, 8, 9] if len(before) else [11, 12])

    def noise(self, rng, length):
        return rng.integers(3, 97, size=length)

    def draw(self, rng, length, facts=None, depth=None):
        ids = rng.integers(3, 97, size=length)
        needles = np.arange(5, 5 + 2 * 4).reshape(2, 4) + round((depth or 0) * (length - 40))
        answers = length - 10 + np.arange(8).reshape(2, 4)
        ids[answers] = ids[needles]
        asked = answers[:, :1] + [-3, 0]
        return Document(ids, answers, needles, asked, needles[:, [0, -1]] + [-1, 2])


def probe_of(model, **kwargs) -> HeadProbe:
    c = model.config
    return HeadProbe(model, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, Noise(), **kwargs)


def eager_weights(model, ids: torch.Tensor) -> torch.Tensor:
    """Attention matrices ``[layers, H, T, T]`` of Transformers' own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    return torch.stack([one[0] for one in found])


def group_max(scores: torch.Tensor, model) -> torch.Tensor:
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    rows = [[max(row[i : i + group]) for i in range(0, len(row), group)] for row in scores.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def run(method, model, probe) -> torch.Tensor:
    with patched(model, config_for(model, "retrieval")):
        return method.scores(probe)
