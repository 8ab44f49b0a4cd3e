"""What a patched model is refused for where continuous batching is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..cache.plan import LayerPlan
from ..config.words import spec_word
from ..errors import UnsupportedModeError
from ..stores.full import Full
from ..stores.sink_recent import SinkRecent
from .rotary import length_limit

KEPT = "_cached_continuous_batching_manager"  # where Transformers keeps a manager for the next session
INSTEAD = "Use generate() with a padded batch"
ALLOCATORS = "transformers.generation.continuous_batching.cache_allocators"  # since 5.24
STORES = {"retrieval": Full, "streaming": SinkRecent}


def check_batching(plans: Sequence[LayerPlan], observed: bool) -> None:
    """Refuse what pages of KV heads cannot do, before a manager is made.

    Raises:
        UnsupportedModeError: this Transformers, an observer, or what the plans say of stores, windows and selections.
    """
    try:
        importlib.import_module(ALLOCATORS)
    except ImportError as error:
        raise UnsupportedModeError(
            "continuous batching of a patched model (generate_batch, cache_implementation='paged', transformers serve "
            f"--continuous-batching) needs Transformers 5.24 or newer. {INSTEAD}, or run dense: "
            "model.set_attn_implementation('sdpa')."
        ) from error
    if observed:
        raise UnsupportedModeError(
            "continuous batching under observe(): it runs on a thread of its own, which the observer does not see. "
            "Observe a forward or generate()."
        )
    _check_layers(plans)


def _check_layers(plans: Sequence[LayerPlan]) -> None:
    for plan in plans:
        if plan.window is not None:
            raise UnsupportedModeError(
                f"continuous batching of a model with sliding-window layers (layer {plan.layer_idx}: {plan.window} "
                f"tokens): its pages are those of retrieval and streaming heads alone. {INSTEAD}."
            )
        for role in plan.filled:
            _check_store(plan.layer_idx, role.heads.role, role.store)
            if role.selects:
                raise UnsupportedModeError(
                    f"continuous batching with decode.retrieval ({spec_word(role.decode)}): decoded tokens of many "
                    f"requests would read all of their tokens. Set it to {{'select': 'dense'}}, or use generate()."
                )


def _check_store(layer: int, role: str, store: Any) -> None:
    wanted = STORES[role]
    if type(store) is not wanted:
        raise UnsupportedModeError(
            f"continuous batching with stores.{role} ({spec_word(store)}) in layer {layer}: pages of {role} heads hold "
            f"what {spec_word(wanted())} keeps. Set stores={{'{role}': {{'store': '{spec_word(wanted())}'}}}}, or use "
            "generate()."
        )


def check_config(config: Any, cb_config: Any, layers: int, tensor_parallel: int) -> None:
    """Refuse what the model's config or the one of continuous batching asks for and pages of KV heads cannot do.

    Args:
        config: of the text model.
        layers: of the model that cache keys, all in pages.
        tensor_parallel: processes that share the heads.

    Raises:
        UnsupportedModeError: the message names the field.
    """
    if layers != config.num_hidden_layers:
        raise UnsupportedModeError(
            f"continuous batching of a model of which {layers} of {config.num_hidden_layers} layers cache keys: the "
            f"others' states have no pages. {INSTEAD}."
        )
    if (found := length_limit(config)) is not None:
        raise UnsupportedModeError(
            f"continuous batching with rope_type '{found[0]}': angles depend on the length of the text, and one "
            f"forward brings texts of many lengths. {INSTEAD}."
        )
    if tensor_parallel > 1:
        raise UnsupportedModeError(
            f"continuous batching of a patched model over {tensor_parallel} processes (tensor parallel): their caches "
            "would not agree on a size. Use one process per model."
        )
    if cb_config.cpu_offload_space is None:
        raise UnsupportedModeError(
            "ContinuousBatchingConfig(cpu_offload_space=None) of a patched model would keep evicted requests in host "
            "memory, and its pages are not copied there: they are read again instead. Leave cpu_offload_space out."
        )
    asked = {field.name: getattr(cb_config, field.name) for field in dataclasses.fields(cb_config)}
    for name, off in OFF.items():
        value = asked.get(name)
        if (any(value) if isinstance(value, tuple) else value) and value != off:
            raise UnsupportedModeError(
                f"ContinuousBatchingConfig({name}={value!r}) of a patched model: which tokens a step reads is made for "
                f"one step at a time, in host memory. Leave {name} out."
            )


def check_generation(generation_config: Any) -> None:
    """Refuse what generate() would do and continuous batching leaves out without a word.

    Raises:
        UnsupportedModeError: beams.
    """
    if (beams := getattr(generation_config, "num_beams", None) or 1) > 1:
        raise UnsupportedModeError(
            f"continuous batching with num_beams={beams}: it searches no beams, and would answer greedily. Set "
            "num_beams=1, or use generate()."
        )


def check_pads(attention_mask: Tensor | None) -> None:
    """Refuse pads in ``generate(cache_implementation="paged")``, which would read them as tokens.

    Raises:
        UnsupportedModeError: the mask hides a token.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedModeError(
            "generate(cache_implementation='paged') with padded rows: continuous batching sees no attention_mask, and "
            "would read the pads as tokens. Call model.generate_batch with a list of prompts without pads."
        )


# Fields of ContinuousBatchingConfig that mean fixed shapes, two steps at once or pages elsewhere; what turns them off.
OFF = {
    "use_async_batching": False,
    "use_cuda_graph": False,
    "q_padding_interval_size": 0,
    "kv_padding_interval_size": 0,
    "varlen_compile_config": None,
    "decode_compile_config": None,
    "default_compile_level": 0,
    "max_blocks_per_request": 0,
    "cpu_offload_space": 0.0,
}
