"""What a config says to vLLM: a role per KV head and the streaming rule. Everything else it may say is refused.

Stands on the config package alone: neither vLLM nor Transformers is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...config.config import LongCtxConfig
from ...config.find import resolve
from ...config.sections import TableUse
from ...config.words import spec_word
from ...errors import UnsupportedModeError


@dataclass(frozen=True)
class HeadRoles:
    """Which KV heads keep every token, and what the others keep.

    Attributes:
        rows: a text per layer with a letter per KV head, ``R`` or ``S``.
        sink: first tokens that a streaming head reads.
        recent: latest tokens that it reads, the query's own among them.
    """

    rows: tuple[str, ...]
    sink: int
    recent: int

    def __str__(self) -> str:
        heads = "".join(self.rows)
        kept = f"the first {self.sink} and the latest {self.recent}" if self.sink else f"the latest {self.recent}"
        return f"{heads.count('R')} of {len(heads)} KV heads cache every token, {heads.count('S')} {kept}"


def head_roles(named: str, hf_config: Any, name_or_path: str | None = None) -> HeadRoles:
    """The roles of the model with this Transformers config, under the config that ``named`` names.

    Raises:
        ConfigError: as ``patch_model``.
        UnsupportedModeError: the config asks for what the plugin does not do.
    """
    config = resolve(named, hf_config, name_or_path)
    refuse(config)
    streaming = config.stores.streaming
    return HeadRoles(config.roles(), streaming.sink, streaming.recent)


def refuse(config: LongCtxConfig) -> None:
    """Raise UnsupportedModeError for the first thing in ``config`` that the plugin would have to ignore."""
    pattern = config.prefill.retrieval
    found = {
        "stores.retrieval.store": (spec_word(config.stores.retrieval), "full"),
        "stores.streaming.store": (spec_word(config.stores.streaming), "sink_recent"),
        "prefill.retrieval": (
            f"table {pattern.table}" if isinstance(pattern, TableUse) else spec_word(pattern),
            "dense",
        ),
        "prefill.streaming.dense_tail": (config.prefill.streaming.dense_tail, 0),
        "decode.retrieval.select": (spec_word(config.decode.retrieval), "dense"),
        "kernel": (config.kernel, "auto"),
        "model.full_attention_layers": (config.model.full_attention_layers, None),
    }
    for key, (given, works) in found.items():
        if given != works:
            only = "none: every layer reads the whole text" if works is None else repr(works)
            raise UnsupportedModeError(
                f"{key}: got {given!r}, and the plugin of vLLM does not do it. What works: {only}."
            )
