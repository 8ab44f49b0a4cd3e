"""The README.md of a Hub repository that holds a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from .config import LongCtxConfig

CARD = """\
---
{metadata}---

# {title}

A config of hf_longctx (`pip install hf-longctx`), a plugin of Hugging Face Transformers: which KV heads of
a model need the whole context. The others cache a constant number of tokens.

- Made for: {model_type}{ids}, {layers} layers, {queries} query heads and {width} KV heads each, head_dim {head_dim}
- Retrieval heads: {retrieval} of {total} KV heads
- Heads from: {source}; confidence: {confidence}

```python
from hf_longctx import patch_model

patch_model(model, "{repo_id}")
```

`hf-longctx configs show {repo_id}` draws the head map. `patch_model` refuses it for another model.
"""


def model_card(config: LongCtxConfig, repo_id: str) -> str:
    """What the config is made for, where its head map comes from, and how to use it; Markdown."""
    model = config.model
    source = config.heads.active.source
    hub_ids = [one for one in model.ids if one.count("/") == 1]
    metadata = {"library_name": "hf_longctx", "tags": ["hf_longctx", "kv-cache", "long-context"]}
    metadata |= {"base_model": hub_ids} if hub_ids else {}
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=repo_id.rpartition("/")[2],
        model_type=model.model_type,
        layers=model.num_hidden_layers,
        queries=model.num_attention_heads,
        width=model.num_key_value_heads,
        head_dim=model.head_dim,
        ids=f" ({', '.join(model.ids)})" if model.ids else "",
        retrieval=config.retrieval_heads,
        total=config.kv_heads,
        source=", ".join(str(source[key]) for key in ("method", "from") if key in source) or "not said",
        confidence=config.heads.confidence,
        repo_id=repo_id,
    )
