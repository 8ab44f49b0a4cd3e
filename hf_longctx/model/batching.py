"""Continuous batching of a patched model: Transformers' manager, over a cache whose pages are of single KV heads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.requests import RequestState

from ..cache.paged.cache import HeadPagedCache
from ..errors import UnsupportedModeError
from ..layout.prompt_learning import virtual_tokens
from .batch_queue import scheduler_class
from .batched import KEPT, check_config, check_generation
from .modules import language_model

if TYPE_CHECKING:
    from .state import PatchState


def start(
    model: nn.Module,
    state: PatchState,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> HeadBatchingManager:
    """What ``model.init_continuous_batching`` gives: the manager kept from an earlier session, or a new one.

    Raises:
        ConfigError: an unknown scheduler.
        UnsupportedModeError: see `check_config` and `check_generation`; virtual tokens of PEFT's prompt learning; or
            the manager that was kept is of another patch.
    """
    kept = getattr(model, KEPT, None)
    if kept is not None:
        if not isinstance(kept, HeadBatchingManager) or kept.state is not state:
            raise UnsupportedModeError(
                "the model has a manager of continuous batching from before it was patched (persistent_manager). Call "
                "model.destroy_cached_continuous_batching_manager() first."
            )
        return kept
    generation_config = copy.copy(generation_config if generation_config is not None else model.generation_config)
    check_generation(generation_config)
    if generation_config.eos_token_id is None:  # else the manager would take that of the model's config
        generation_config.eos_token_id = -1
    asked = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
    asked = asked if isinstance(asked, ContinuousBatchingConfig) else ContinuousBatchingConfig()
    scheduler_class(asked.scheduler_type)
    if (added := virtual_tokens(state.patched, model)) is not None:
        raise UnsupportedModeError(f"continuous batching: {added}, and it would leave them out. Use generate().")
    base = language_model(model)
    helper = DistributedHelper(getattr(model, "_device_mesh", None), None, getattr(model, "tp_plan", {}))
    check_config(base.config, asked, len(state.plans), helper.tp_size)
    # Fixed shapes and a second step under way are what Transformers chooses on a GPU: see check_config.
    asked = replace(asked, use_cuda_graph=False, use_async_batching=False, max_blocks_per_request=0)
    return HeadBatchingManager(model, state, generation_config, asked, workload_hints)


class HeadBatchingManager(ContinuousBatchingManager):
    """Transformers' manager over a `HeadPagedCache`.

    Attributes:
        state: of the patch under which it was made.
    """

    def __init__(self, model: nn.Module, state: PatchState, *args: Any):
        self.state = state
        super().__init__(model, *args)

    def __reduce__(self) -> tuple:
        """A copy of a model that keeps its manager has none: a thread and its queues have no copies."""
        return type(None), ()

    def switch_to_cb_friendly_attn(self, model: nn.Module, auto_switch_to_flash: bool = True) -> None:
        """The patched attention reads the pages: nothing is switched."""

    @property
    def cache(self) -> HeadPagedCache | None:
        """That of the session; None before it started."""
        return None if self.batch_processor is None else self.batch_processor.cache

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        if self.batch_processor is not None:
            self.batch_processor.reset()
            return self.batch_processor
        with torch.inference_mode(False):  # a manager that is kept may run outside of it the next time
            return self._new_processor()

    def _new_processor(self) -> ContinuousBatchProcessor:
        cache = self._new_cache()
        settings = self.continuous_batching_config
        self._use_prefix_sharing = cache.use_prefix_sharing
        update_cb_config_after_cache_creation(settings, cache.num_blocks, cache.max_batch_tokens)
        scheduler = scheduler_class(settings.scheduler_type)(
            cache=cache, safety_margin=settings.safety_margin, max_requests_per_batch=settings.max_requests_per_batch
        )
        scheduler.fail = self._fail
        return ContinuousBatchProcessor(
            cache=cache,
            config=language_model(self.model).config,
            generation_config=self.generation_config,
            continuous_batching_config=settings,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue,
            cancel_queue=self.cancel_queue,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=self.model.device,
            model_dtype=self.model.dtype,
            scheduler=scheduler,
            distributed_helper=self.distributed_helper,
        )

    def _fail(self, error: Exception, state: RequestState) -> None:
        """End one active request with an error, and go on with the others."""
        self.batch_processor._handle_request_error(error, state)
        self.batch_processor.scheduler.finish_request(state.request_id)

    def _new_cache(self) -> HeadPagedCache:
        model = self.model
        config = language_model(model).config
        keeps = getattr(model, "_supports_logits_to_keep", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return HeadPagedCache(
            self.state.plans,
            config,
            self.continuous_batching_config,
            head_dim,
            model.device,
            model.dtype,
            callable(keeps) and keeps(),
        )
