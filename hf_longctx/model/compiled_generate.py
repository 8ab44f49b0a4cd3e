"""What ``generate(compile_config=...)`` asks of a model: whether decoded tokens compile, and what runs them then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cache.cache import LongCtxCache
from ..cache.seam import CACHE
from .hooks import OnModel


class AutoCompile(OnModel):
    """Replaces ``_valid_auto_compile_criteria``: a LongCtxCache compiles where a compile_config asks for it.

    Transformers itself compiles for static caches, on a GPU without being asked.
    """

    name = "_valid_auto_compile_criteria"

    def __call__(self, model_kwargs: dict, generation_config: Any) -> bool:
        ours = not self.dense and isinstance(model_kwargs.get(CACHE), LongCtxCache)
        asked = generation_config.compile_config is not None and not generation_config.disable_compile
        quantizer = getattr(self.model, "hf_quantizer", None)
        able = self.state.compiles and (quantizer is None or quantizer.is_compileable)
        offloads = {"cpu", "disk"} & {str(place) for place in getattr(self.model, "hf_device_map", {}).values()}
        if ours and asked and able and not (offloads and len(self.model.hf_device_map) > 1):
            return True
        return self.original(model_kwargs, generation_config)


class CompiledCall(OnModel):
    """Replaces ``get_compiled_call``: single tokens over a LongCtxCache run compiled, all else as without a compiler.

    Chunks of a prompt and the drafts of assisted decoding come this way too. The mask, which grows with every token, is
    said to be of no fixed length.
    """

    name = "get_compiled_call"

    def __call__(self, compile_config: Any) -> Callable:
        compiled = self.original(compile_config)

        def call(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids")
            if not isinstance(kwargs.get(CACHE), LongCtxCache):
                return compiled(*args, **kwargs)
            if ids is None or ids.shape[1] > 1:
                return self.model(*args, **kwargs)
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                torch._dynamo.maybe_mark_dynamic(mask, 1)
            return compiled(*args, **kwargs)

        return compiled if self.dense else call


ON_COMPILED: tuple[type[OnModel], ...] = (AutoCompile, CompiledCall)
