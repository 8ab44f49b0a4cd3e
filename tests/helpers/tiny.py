"""Tiny random models of the families, and the dense-mask reference that patched models are held to."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import hf_longctx.model.attention
from hf_longctx import LongCtxCache, LongCtxConfig
from hf_longctx.cache.layer_kv import LayerKV
from hf_longctx.kernels import reference
from hf_longctx.model.family import find_family

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # the types that run every mode; test_families.py has all
SLIDING = tuple(one for one in FAMILIES if find_family(one).sliding != "none")  # may have windows of their own
DENSE_MASK = "dense_mask_reference"


def tiny_config(
    family: str,
    kv_heads: int = 4,
    group: int = 2,
    layers: int = 3,
    sliding: int | None = None,
    head_dim: int = 8,
    **extra,
):
    """A config of 3 small layers; ``sliding`` gives every layer (as in Mistral) or every second one (Qwen) a window."""
    if family in FAMILIES and find_family(family).sliding == "all":
        extra["sliding_window"] = sliding
    elif sliding is not None:
        types = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
        extra |= {"use_sliding_window": True, "sliding_window": sliding, "layer_types": types}
    return AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=4 * kv_heads * group,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        **extra,
    )


def tiny_model(family: str = "llama", dtype=torch.float32, **kwargs):
    """A random tiny model in eval mode on stock sdpa attention."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **kwargs), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def roles_of(kind: str, layers: int, kv_heads: int) -> list[str]:
    """Role letters per layer: all retrieval, all streaming, mixed within layers, or different per layer."""
    mixed = ["".join("RS"[(i + j) % 2] for j in range(kv_heads)) for i in range(layers)]
    if kind == "by layer":
        return ["R" * kv_heads, "S" * kv_heads, *mixed][:layers]
    return {"retrieval": ["R" * kv_heads] * layers, "streaming": ["S" * kv_heads] * layers, "mixed": mixed}[kind]


def config_for(model, roles="mixed", sink: int = 4, recent: int = 16, stores=None, **top) -> LongCtxConfig:
    """A config for a tiny model: ``roles`` is a kind of ``roles_of`` or a list of letters; ``stores``: by role."""
    described = LongCtxConfig.describe(model.config)
    if isinstance(roles, str):
        roles = roles_of(roles, described["num_hidden_layers"], described["num_key_value_heads"])
    stores = {"streaming": {"store": "sink_recent", "sink": sink, "recent": recent}, **(stores or {})}
    return LongCtxConfig.from_dict({"model": described, "heads": {"roles": roles}, "stores": stores, **top})


def dense_mask_visible(
    layer_roles: str, group: int, starts, query: int, keys: int, sink: int, recent: int, window=None
):
    """Visible keys ``[B, H, query, keys]``: the queries are the last slots. Written from the rule alone."""
    per_row = []
    for start in starts:
        i = torch.arange(keys - query, keys)[:, None] - start
        j = torch.arange(keys)[None, :] - start
        causal = (j <= i) & (j >= 0)
        stream = causal & ((j < sink) | (i - j < recent))
        if window is not None:
            per_row.append((causal & (i - j < window)).expand(len(layer_roles) * group, -1, -1))
            continue
        per_row.append(torch.stack([causal if r == "R" else stream for r in layer_roles for _ in range(group)]))
    return torch.stack(per_row)


class DenseMask:
    """Runs a stock model with the streaming rule as an explicit mask per head, through Transformers' own caches."""

    def __init__(self, model, config: LongCtxConfig):
        self.model, self.roles = model, config.roles()
        self.sink, self.recent = config.stores.streaming.sink, config.stores.streaming.recent

    def __enter__(self):
        AttentionInterface.register(DENSE_MASK, self.attend)
        AttentionMaskInterface.register(DENSE_MASK, lambda *args, attention_mask=None, **kwargs: attention_mask)
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(DENSE_MASK)
        return self.model

    def __exit__(self, *exc):
        self.model.set_attn_implementation(self.before)

    def attend(self, module, q, k, v, mask, scaling=None, **kwargs):
        starts = [0] * q.shape[0] if mask is None else mask.long().argmax(-1).tolist()
        if mask is not None:
            starts = [s if row.any() else mask.shape[1] for s, row in zip(starts, mask, strict=True)]
        window = kwargs.get("sliding_window")
        roles = self.roles[module.layer_idx]
        visible = dense_mask_visible(
            roles, q.shape[1] // k.shape[1], starts, q.shape[2], k.shape[2], self.sink, self.recent, window
        )
        out, _ = reference.attention(q, k, v, visible, scaling)
        return out.transpose(1, 2).contiguous(), None


class Shadow:
    """Recomputes every attention call of a patched model from all keys ever written, and keeps the largest errors.

    ``recent_off_by``: a control, by which windows are shorter than they are, the model's own among them.
    """

    def __init__(self, monkeypatch, config: LongCtxConfig, recent_off_by: int = 0):
        self.config, self.off, self.calls = config, recent_off_by, 0
        self.errors: dict[int, float] = {}  # by layer
        self.keys: dict[int, tuple] = {}
        update, attend = LongCtxCache.update, hf_longctx.model.attention.attend

        def shadow_update(cache, k, v, layer_idx, *args, **kwargs):
            old = self.keys.get(layer_idx)
            self.keys[layer_idx] = (
                (k, v) if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True))
            )
            return update(cache, k, v, layer_idx, *args, **kwargs)

        def shadow_attend(module, q, k, v, attention_mask, **kwargs):
            out, weights = attend(module, q, k, v, attention_mask, **kwargs)
            if hasattr(module, "longctx_plan"):  # no layer that is left to Transformers
                self.check(module, q, k, out, kwargs)
            return out, weights

        monkeypatch.setattr(LongCtxCache, "update", shadow_update)
        monkeypatch.setattr(hf_longctx.model.attention, "attend", shadow_attend)
        AttentionInterface.register(hf_longctx.model.attention.NAME, shadow_attend)

    def differ(self, layer: int, got: torch.Tensor, right: torch.Tensor) -> None:
        """Keep the largest difference of a layer."""
        self.errors[layer] = max(self.errors.get(layer, 0.0), (got - right).abs().max().item())

    @property
    def error(self) -> float:
        """The largest of all layers."""
        return max(self.errors.values(), default=0.0)

    def check(self, module, q, kept, out, given: dict) -> None:
        assert isinstance(kept, LayerKV)
        k, v = self.keys[module.layer_idx]
        rows, plan = kept.forward.rows, module.longctx_plan
        starts = rows.starts or (0,) * q.shape[0]
        stores = self.config.stores.streaming
        window = None if plan.window is None else plan.window - self.off
        visible = dense_mask_visible(
            plan.letters,
            q.shape[1] // k.shape[1],
            starts,
            q.shape[2],
            k.shape[2],
            stores.sink,
            stores.recent - self.off,
            window,
        )
        more = {field: given[name] for name, field in plan.scores}
        want, _ = reference.attention(q, k, v, visible, given["scaling"], **more)
        for row, start in enumerate(starts):
            real = max(0, start - rows.past)
            got, right = out[row, real:], want[row].transpose(0, 1)[real:]
            if got.numel():
                assert not torch.isnan(got).any()
                self.differ(module.layer_idx, got, right)
        self.calls += 1


def left_padded(lengths: list[int], vocab: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask ``[B, longest]`` of rows of random tokens, padded on the left."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, vocab, (length,))
        mask[row, longest - length :] = 1
    return ids, mask
