"""A tiny Llama as a GGUF file, written with the gguf package, and an installed package that is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .tiny import tiny_config
from .tiny_tokenizer import byte_bpe

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = "{% for message in messages %}Question: {{ message['content'] }}{% endfor %}"
UNKNOWN = "<|endoftext|>"  # which Transformers adds where a vocabulary has none


def tiny_gguf(path: Path) -> LlamaForCausalLM:
    """Write a random Llama in float32, with a tokenizer and a chat template, and return the model."""
    import gguf

    tokenizer = byte_bpe()
    config = tiny_config("llama", tie_word_embeddings=True)
    config.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Tiny One")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(*_tensor(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer, tokenizer) -> None:
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    writer.add_token_list([UNKNOWN if token == "<|chat|>" else token for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
    writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for i in range(len(made["vocab"]))])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATE)


def _tensor(name: str, weight: torch.Tensor, config) -> tuple:
    """A weight by its name in GGUF; those of queries and keys are stored with the two halves of a head interleaved."""
    known = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in known:
        return known[name], weight.numpy()
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(part)
    if heads is not None:
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{NAMES[part]}.weight", weight.contiguous().numpy()


def stub_package(folder: Path, monkeypatch) -> Path:
    """A package in place of the one with the real checkpoint, which cannot be imported, and its GGUF: a tiny one."""
    from hf_longctx.model import checkpoint

    package = folder / "site" / checkpoint.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import llm_that_is_not_installed\n")
    path = package / checkpoint.GGUF
    tiny_gguf(path)
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.setattr(checkpoint, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv(checkpoint.FOLDERS, str(folder / "made"))
    return path
