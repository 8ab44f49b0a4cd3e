"""``docs/models.md``: the model types that can be patched, from their records, and those that cannot, with reasons."""

from __future__ import annotations

import importlib

from .family import Family, families, find_family

# Causal language models of Transformers that need more than a record and `Scores`: reason -> model types.
LEFT_OUT = {
    "Multi-head latent attention: one vector per token stands for the keys and values of all heads, so there are no KV "
    "heads of which each could keep its own tokens.": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa hy_v4 longcat_flash "
        "minicpm3 mistral4 mistral_large4_text sarvam_mla youtu"
    ),
    "An indexer of its own that chooses the tokens which a query reads.": "qwen4_exp_text",
    "Layers of another number of KV heads, or of another head_dim, than the rest.": "gemma4_text mimo_v2_flash",
    "Layers of another number of query heads than the rest.": "laguna",
    "Layers that read the keys of an earlier layer.": "gemma3n_text",
    "Layers that are run more than once, each time with a cache of their own.": "dory hrm_text",
    "A mask that its attention makes from the values.": "doge",
    "An attention that is called twice, with halves of the values.": "diffllama",
    "A base model that does not hand keyword arguments on to its layers: without a cache they do not learn where the "
    "sequences start.": "nemotron stablelm",
    "An attention that reads the blocks of keys which the model chooses itself.": "minimax_m3_vl_text",
    "Query heads that are experts, of which each token takes some.": "jetmoe",
    "An attention that does not go through Transformers' attention interface.": "bloom falcon gpt_neo mpt xglm",
    "An attention that takes its cache by another name, or inside of another module.": "dbrx gpt_bigcode gpt_neox",
    "State spaces or linear attention whose states are not in Transformers' common cache, or which stand beside "
    "attention in one layer, or which Transformers itself does not read in parts.": (
        "bailing_hybrid bamba falcon_h1 granitemoehybrid jamba kimi_linear lara_mini minimax nemotron_h "
        "recurrent_gemma zamba zamba2 zaya"
    ),
    "Models that also speak: their thinkers were tried in one forward only.": "qwen2_5_omni_text qwen3_omni_moe_text",
    "Nothing is in the way: it serves as the example of [write your own](write_your_own.md).": "nanochat",
}
WINDOWS = {
    "none": "none",
    "all": "every layer, if `sliding_window` is set",
    "layer_types": "as `layer_types` says",
}
TOP = """# Models

```sh
hf-longctx configs models
```

Made by `hf-longctx configs models` from the files in `patches/`: {count} model types, by `config.model_type`. Each is
tested on a tiny random model: all heads retrieval equals eager attention, streaming heads equal their definition. That
is done with Transformers 5.23 and 5.24; older ones do not have all of them, or a type is refused there in a sentence.
`hf-longctx configs` lists the checkpoints for which head maps ship.

Windows are the model's own: such a layer keeps its window, and none of its heads is a retrieval or streaming head.
Where `layer_types` says so, layers of linear attention, convolutions or chunked attention go on as Transformers
computes them, and their states are in the same cache. Scores are what attention adds to the product of queries and
keys. Multimodal: the models around such a language model that are tested with an image in the prompt.

| model type | checkpoints | windows | scores | multimodal |
|---|---|---|---|---|
"""
LEFT = """
## Left out

| model type | why |
|---|---|
"""


def models_page() -> str:
    """The page as Markdown."""
    names = families()
    rows = [_row(find_family(name)) for name in names]
    left = [f"| {', '.join(f'`{name}`' for name in types.split())} | {why} |\n" for why, types in LEFT_OUT.items()]
    return TOP.format(count=len(names)) + "".join(rows) + LEFT + "".join(left)


def _row(family: Family) -> str:
    about = importlib.import_module(f"hf_longctx.patches.{family.model_type}").__doc__
    scores = ", ".join(family.scores.values()) or "none"
    around = ", ".join(f"`{name}`" for name in family.multimodal)
    cells = (f"`{family.model_type}`", " ".join(about.split()), WINDOWS[family.sliding], scores, around)
    return f"| {' | '.join(cells)} |\n"
