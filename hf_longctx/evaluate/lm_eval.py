"""``hf-longctx``, a model of lm-evaluation-harness: its ``HFLM``, patched. Importing this file registers it.

Needs lm-eval, which the extra ``eval`` brings; without it the import raises ConfigError.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..assets import embedded
from ..cache.plan import FEWEST
from ..config.config import LongCtxConfig
from ..config.words import check_mapping, check_word
from ..errors import ConfigError, UnsupportedModelError
from ..model.modules import state_of
from ..model.patch import patch_model, unpatch_model
from ..model.report import report

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as missing:
    if missing.name != "lm_eval":
        raise
    raise ConfigError("lm-eval is not installed; the extra 'eval' brings it: pip install -e '.[eval]'.") from None

NAME = "hf-longctx"
DOTTED = "longctx."
SECTIONS = ("heads", "stores", "prefill", "decode", "kernel")

# Below lm-eval's own logger, whose level and handler its command line sets.
logger = logging.getLogger(f"lm_eval.{__name__}")


@register_model(NAME)
class LongCtxLM(HFLM):
    """lm-eval's ``HFLM`` on a patched model; with ``longctx=False`` it is ``HFLM``."""

    def __init__(
        self,
        pretrained: Any,
        *args: Any,
        longctx: str | Path | Mapping | LongCtxConfig | bool | None = "auto",
        longctx_overrides: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Load a model as ``HFLM`` does, then patch it.

        Args:
            pretrained: as ``HFLM`` (a model that is already loaded is patched in place), or an embedded model,
                ``hf-longctx/NAME``. So is ``tokenizer``.
            longctx: what ``patch_model`` takes, or True for "auto"; False, None or "none": dense.
            longctx_overrides: sections laid over the config, ``{"heads": {"retrieval_fraction": 0.25}}``. On a
                command line each may be an argument of its own: ``longctx.heads.retrieval_fraction=0.25``.
            args, kwargs: as ``HFLM``.

        Raises:
            UnsupportedModelError: as ``patch_model``.
            ConfigError: as ``patch_model``, or the overrides are no sections, or are given for a dense model.
        """
        dense = longctx is None or longctx is False or str(longctx).lower() == "none"
        dotted = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(DOTTED)}
        sections = _sections(longctx_overrides, dotted)
        if dense and sections:
            raise ConfigError(f"longctx={longctx!r} asks for the dense model, which has no place for {sections}.")
        if isinstance(kwargs.get("tokenizer"), str):
            kwargs["tokenizer"] = embedded(kwargs["tokenizer"])
        super().__init__(embedded(pretrained) if isinstance(pretrained, str) else pretrained, *args, **kwargs)
        if dense:
            with contextlib.suppress(UnsupportedModelError):  # a wrapper that holds no Transformers model
                unpatch_model(self.model)
            return
        patch_model(self.model, "auto" if longctx is True else longctx, **sections)
        found = report(self.model)
        logger.info("patched: %d of %d KV heads %s", found.retrieval_heads, found.kv_heads, found.kept)

    def get_model_info(self) -> dict[str, Any]:
        """``HFLM``'s, with ``longctx``: the merged config and what really ran, or False for a dense model."""
        info = super().get_model_info()
        state = self._state()
        if state is None:
            return info | {"longctx": False}
        found = report(self.model)
        logger.info("what ran:\n%s", found)
        return info | {"longctx": {"config": state.config.to_dict(), "report": asdict(found)}}

    def _state(self) -> Any:
        with contextlib.suppress(UnsupportedModelError):
            return state_of(self.model)
        return None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """``HFLM``'s, but rows long enough for a prefill pattern or a dense tail run one at a time.

        HFLM pads on the right and passes no mask: both would take the pads for the row's last tokens.
        """
        state = self._state()
        roles = () if state is None else [role for plan in state.plans for role in plan.filled]
        least = [role.prefill.min_tokens for role in roles if role.prefill is not None]
        least += [FEWEST for role in roles if role.dense_tail]
        if not least or len(requests) == 1 or self.batch_size == 1:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        shortest = min(least)
        inputs = [min(len(context) + len(continuation) - 1, self.max_length) for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        for alone in (True, False):
            which = [i for i, length in enumerate(inputs) if (length >= shortest) == alone]
            if which:
                with self._one_at_a_time() if alone else contextlib.nullcontext():
                    found = super()._loglikelihood_tokens([requests[i] for i in which], disable_tqdm, override_bs)
                answers |= zip(which, found, strict=True)
        return [answers[i] for i in range(len(requests))]

    @contextlib.contextmanager
    def _one_at_a_time(self):
        kept = self.batch_size_per_gpu
        self.batch_size_per_gpu = 1
        try:
            yield
        finally:
            self.batch_size_per_gpu = kept


def _sections(given: Mapping[str, Any] | None, dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of overrides as keywords of ``patch_model``."""
    found = copy.deepcopy(check_mapping({} if given is None else given, "longctx_overrides"))
    for name, value in dotted.items():
        within = found
        path = name.removeprefix(DOTTED).split(".")
        for key in path[:-1]:
            within = within.setdefault(key, {}) if isinstance(within, dict) else within
        if not isinstance(within, dict) or path[-1] in within:
            raise ConfigError(f"{name}: got {value!r}, but other overrides already say {found}. Give one of them.")
        within[path[-1]] = value
    for name in found:
        check_word(name, SECTIONS, "longctx_overrides")
    return found


def command_line(args: Sequence[str]) -> None:
    """lm-eval's own command line with these arguments, ``hf-longctx`` among its models. It exits as lm-eval does."""
    kept = sys.argv
    sys.argv = [f"{NAME} lm-eval", *args]
    try:
        cli_evaluate()
    finally:
        sys.argv = kept
