"""A config of the same class and structure at tiny sizes: a random model of it is built and run in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

LAYERS = 2  # at least; more where the model has more kinds of layers
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
DIM = 16
WINDOW = 9  # tokens of a sliding window; a chunk has one less
VOCAB = 128
INNER = 48  # of feed-forward parts

# New size, and the names that configs have for it. What is 0, None or not a number stays.
SIZES = (
    (HIDDEN, "hidden_size d_model n_embd emb_dim embed_dim embedding_size embedding_dim word_embed_proj_dim dim_model"),
    (HIDDEN, "out_hidden_size hidden_size_global backbone_hidden_size input_embedding_size output_embedding_size"),
    (HIDDEN, "projection_dim output_dim vision_output_dim projector_output_dim lru_width"),
    (HIDDEN * 2, "mamba_d_ssm mamba_intermediate_size attention_hidden_size"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads o_groups"),
    (HEADS, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads index_n_heads"),
    (HEADS, "num_attention_heads_per_layer swa_num_attention_heads conf_num_attention_heads indexer_n_heads"),
    (HEADS, "linear_num_value_heads linear_num_heads"),
    (HEADS, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (KV_HEADS, "num_key_value_heads num_kv_heads kv_n_heads n_kv_heads swa_num_key_value_heads num_query_groups"),
    (KV_HEADS, "num_global_key_value_heads linear_num_key_heads"),
    (DIM, "head_dim kv_channels d_kv dim_head d_head attention_head_size swa_head_dim global_head_dim v_head_dim"),
    (DIM, "qk_nope_head_dim kv_lora_rank o_lora_rank index_head_dim indexer_head_dim query_pre_attn_scalar"),
    (DIM, "linear_key_head_dim linear_value_head_dim linear_head_dim ssm_state_size state_size time_step_rank"),
    (DIM, "mamba_d_state mamba_chunk_size mamba_dt_rank mamba_d_head mamba_head_dim mamba_headdim"),
    (DIM, "hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank gated_norm_rank loop_gate_rank d_rel"),
    (DIM, "router_hidden_size floor_scale log_scaling_n_floor"),
    (24, "q_lora_rank qk_head_dim"),
    (32, "attention_head_dim ple_embed_dim ngram_vocab_size_base"),
    (8, "qk_rope_head_dim rotary_dim attention_chunk_size chunk_size block_size"),
    (8, "index_topk index_block_size indexer_budget mamba_n_heads mamba_num_heads n_mamba_heads"),
    (8, "split_ngram_parts make_ngram_vocab_size_divisible_by"),
    (
        INNER,
        "intermediate_size ffn_dim d_ff dim_ff dff d_inner n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim",
    ),
    (INNER, "feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size mlp_dim"),
    (INNER, "shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size"),
    (INNER, "intermediate_size_mlp dense_intermediate_size moe_latent_size"),
    (WINDOW, "sliding_window sliding_window_size local_attention window_size attention_window_size"),
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (VOCAB, "encoder_hash_byte_group_vocab"),
)
# The same for what is small already: the smaller of both.
AT_MOST = (
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts n_group num_expert_group"),
    (2, "hc_mult hc_count decoder_sparse_step moe_layer_interval attn_layer_period expert_layer_period"),
    (2, "sliding_window_pattern index_topk_blocks indexer_compress_ratio"),
    (1, "topk_group indexer_kv_heads n_shared_experts num_shared_experts moe_num_shared_experts attn_layer_offset"),
    (1, "expert_layer_offset moe_layer_start_index num_nextn_predict_layers"),
)
NEW = {name: size for size, names in SIZES for name in names.split()}
MOST = {name: size for size, names in AT_MOST for name in names.split()}
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
DEPTH += ("num_encoder_layers", "num_decoder_layers", "conf_num_hidden_layers", "num_blocks", "num_global_layers")
DEPTH += ("layers",)
# Which layers are of a kind: the first so many, the last so many, or those of a list of indices.
FIRST = ("first_k_dense_replace", "num_dense_layers")
LAST = ("num_kv_shared_layers",)
INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids")
INDICES += ("cross_attention_layers", "ple_layer_ids", "fullatt_block_indexes", "deepstack_visual_indexes")
INDICES += ("intermediate_layers_indices", "global_attn_indexes", "rope_scaling_layers")
SOFTCAPS = ("attn_logit_softcapping", "attention_logit_softcapping")
USUAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_copy(hf_config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A config of the same class and structure at tiny sizes; ``hf_config`` is not changed.

    It has one layer of each kind, in their order, and at least two; 4 query and 2 KV heads; windows of 9 tokens and
    chunks of 8; 128 tokens, of which 3 to 99 mean nothing special. Configs inside (text, vision, audio) are made tiny
    as well. RoPE stays of its kind. A size of a name that is not known here stays as it is.

    Args:
        changes: attributes of the text config, set last.
    """
    small = copy.deepcopy(hf_config)
    for one in list(_configs(small)):
        _shrink(one)
    _renumber(small)
    text = small.get_text_config(decoder=True)
    for name, value in changes.items():
        setattr(text, name, value)
    return small


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config, and all inside of it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _shrink(config: PreTrainedConfig) -> None:
    by_layer = _overrides(config)
    if by_layer:
        config.per_layer_config = None
    kept = _kept_layers(config, by_layer)
    _cut_layers(config, kept)
    before = dict(vars(config))
    for name, value in before.items():
        if (small := _small(name, value)) is not value:
            setattr(config, name, small)
    _fit(config, before)
    if by_layer:
        config.per_layer_config = {
            new: {name: _small(name, value) * (1 + (name == "head_dim")) for name, value in by_layer[old].items()}
            for new, old in enumerate(kept)
            if old in by_layer
        }
    _fit_rope(config)


def _small(name: str, value: Any) -> Any:
    """The new value of an attribute."""
    if isinstance(value, list):
        return [_small(name, one) for one in value] if name in NEW or name in MOST else value
    if name in SOFTCAPS and value:
        return min(value, 2.0)
    if name == "attention_multiplier" and value:
        return max(value, DIM**-0.5)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
        return value
    return min(value, MOST[name]) if name in MOST else NEW.get(name, value)


def _overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What single layers have of their own, in the Transformers that has such configs."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return copy.deepcopy(config._heterogeneity_spec.per_layer_overrides)


def _depth(config: PreTrainedConfig) -> int:
    return max((value for name in DEPTH if isinstance(value := vars(config).get(name), int)), default=0)


def _per_layer(config: PreTrainedConfig, layers: int) -> dict[str, list]:
    """The lists that have one entry for each layer."""
    values = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    return {
        name: value
        for name, value in values.items()
        if len(value) == layers and name not in INDICES and not name.endswith(("multipliers", "token_id", "section"))
    }


def _kept_layers(config: PreTrainedConfig, by_layer: dict[int, dict]) -> list[int]:
    """The first layer of each kind, and those after them up to `LAYERS`."""
    layers = _depth(config)
    lists = _per_layer(config, layers)
    own = vars(config)
    first: dict[str, int] = {}
    for i in range(layers):
        kind = [str(by_layer.get(i)), *(str(value[i]) for value in lists.values())]
        kind += [i < own[name] for name in FIRST if own.get(name)]
        kind += [i >= layers - own[name] for name in LAST if own.get(name)]
        kind += [i in own[name] for name in INDICES if own.get(name)]
        first.setdefault(str(kind), i)
    kept = set(first.values())
    more = [i for i in range(layers) if i not in kept]
    return sorted([*kept, *more[: max(0, LAYERS - len(kept))]])


def _cut_layers(config: PreTrainedConfig, kept: list[int]) -> None:
    layers = _depth(config)
    own = vars(config)
    for name, value in _per_layer(config, layers).items():
        setattr(config, name, type(value)(value[i] for i in kept))
    for name in (one for one in FIRST if own.get(one)):
        setattr(config, name, sum(i < own[name] for i in kept))
    for name in (one for one in LAST if own.get(one)):
        setattr(config, name, sum(i >= layers - own[name] for i in kept))
    for name in (one for one in INDICES if own.get(one)):
        setattr(config, name, type(own[name])(new for new, old in enumerate(kept) if old in own[name]))
    for name in (one for one in DEPTH if own.get(one)):
        setattr(config, name, min(own[name], len(kept)))
    if own.get("moe_layer_end_index"):
        config.moe_layer_end_index = len(kept) - 1


def _fit(config: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Sizes that follow from others, as they did in ``before``."""
    own = vars(config)
    for name in ("head_dim", "num_key_value_heads"):
        if name in own and own[name] is None:
            setattr(config, name, NEW[name])
    if before.get("attention_hidden_size") and before["attention_hidden_size"] == before["hidden_size"]:
        config.attention_hidden_size = HIDDEN
    if own.get("num_heads") and own.get("state_size"):  # of a state space
        config.num_heads = own.get("expand", 2) * HIDDEN // DIM
    if own.get("kv_lora_rank"):
        if "num_key_value_heads" in own:
            config.num_key_value_heads = HEADS  # every query head makes its own keys from the shared vector
        rope = own["qk_rope_head_dim"]
        if before.get("head_dim"):
            whole = before["head_dim"] != before["qk_rope_head_dim"]
            config.head_dim = rope + own["qk_nope_head_dim"] if whole else rope


def _fit_rope(config: PreTrainedConfig) -> None:
    """RoPE parameters that go by the number of its frequencies."""
    own = vars(config)
    rope = own.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    dim = own.get("head_dim") or DIM
    rotated = own.get("qk_rope_head_dim")
    for one in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        part = one.get("partial_rotary_factor") or own.get("partial_rotary_factor") or 1.0
        if rotated and part < 1:
            part = rotated / dim
            one["partial_rotary_factor"] = part
        half = (rotated or int(dim * part)) // 2
        for name in ("short_factor", "long_factor"):
            if one.get(name):
                one[name] = list(one[name])[:half]
        if one.get("mrope_section") or "mrope_section" in (
            getattr(config, "ignore_keys_at_rope_validation", None) or ()
        ):
            one["mrope_section"] = [half // 3, half // 3, half - 2 * (half // 3)]  # some want the first two equal
        if one.get("llama_4_scaling_beta"):
            one["original_max_position_embeddings"] = DIM


def _renumber(config: PreTrainedConfig) -> None:
    """Token ids inside of the vocabulary, the same for one name in all configs."""
    new = dict(USUAL)
    for one in list(_configs(config)):
        for name, value in list(vars(one).items()):
            if not name.endswith(("_token_id", "_token_index", "_token_ids")) or value is None:
                continue
            new.setdefault(name, VOCAB - 1 - (len(new) - len(USUAL)))
            setattr(one, name, [new[name]] if isinstance(value, (list, tuple)) else new[name])
