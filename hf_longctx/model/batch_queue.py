"""The scheduler of continuous batching, which ends a request that can never run instead of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from ..errors import ConfigError, UnsupportedModeError


class EndsAlone:
    """What is added to a scheduler of Transformers, which stops every request for one that does not fit the cache.

    Attributes:
        fail: ends an active request with an error.
    """

    fail: Callable[[Exception, RequestState], None]

    def add_waiting_request(self, state: RequestState) -> None:
        """Take a request.

        Raises:
            ConfigError: it has no tokens.
            UnsupportedModeError: the cache has not enough pages for its prompt.
        """
        if not state.initial_tokens:
            raise ConfigError("a request without tokens: a prompt has at least one.")
        if not self.cache.fits(len(state.initial_tokens)):
            raise self._unfit(f"a prompt of {len(state.initial_tokens)} tokens", "give a shorter prompt")
        super().add_waiting_request(state)

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Those that wait get the pages of those that are gone, as when these have finished."""
        gone = super().clear_cancelled_requests()
        if gone:
            self.block_new_requests = False
        return gone

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, ...]:
        found = super().schedule_batch(token_budget, cache_budget)
        while found[0] is None and (state := self._outgrown()) is not None:
            self.fail(self._unfit(f"a request of {state.current_len() + 1} tokens", "set max_new_tokens"), state)
            self.block_new_requests = False
            found = super().schedule_batch(token_budget, cache_budget)
        return found

    def _outgrown(self) -> RequestState | None:
        """The only active request, if it got longer than an empty cache could hold."""
        if len(self.active_requests) != 1 or not self.starved_requests:
            return None
        state, more = self.starved_requests[0]
        return None if self.cache.fits(state.current_len() + more) else state

    def _unfit(self, what: str, instead: str) -> UnsupportedModeError:
        return UnsupportedModeError(
            f"{what}, which the cache of continuous batching has not enough pages for (num_blocks="
            f"{self.cache.num_blocks} of page_size={self.cache.page_size}). Give ContinuousBatchingConfig a larger "
            f"num_blocks or max_memory_percent, or {instead}."
        )


@cache
def scheduler_class(word: str) -> type[Scheduler]:
    """Transformers' scheduler of this name, with `EndsAlone`.

    Raises:
        ConfigError: it has none.
    """
    if word not in SCHEDULER_MAPPING:
        known = ", ".join(sorted(SCHEDULER_MAPPING))
        raise ConfigError(f"ContinuousBatchingConfig(scheduler_type={word!r}); known: {known}.")
    stock = SCHEDULER_MAPPING[word]
    return type(stock.__name__, (EndsAlone, stock), {"__doc__": stock.__doc__})
