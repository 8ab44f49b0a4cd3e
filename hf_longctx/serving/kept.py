"""``model.generate`` of a server: prompts are kept between its calls, and a client that hangs up ends one."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from ..cache.seam import CACHE
from ..errors import LongCtxError
from ..model.modules import state_of
from ..model.report import Report, report
from ..prompts.prompt import ONE_ROW, STORED, Prompt
from ..prompts.prompt_cache import PromptCache
from .call import CALL, Call, ClientGone, UntilGone, WhileListening

TAKES = ("attention_mask", "tokenizer")  # beside those that it names; a call with others is left to the model
ALONE = ("num_beams", "num_return_sequences")  # of which a kept prompt has one
OUTCOMES = ("answered", "stopped", "refused", "failed")
WAYS = ("kept", "plain")


class KeptGenerate:
    """Takes the place of ``generate`` of a patched model.

    A call of one sequence starts from the longest beginning that was read before, reads the rest in pieces, and its
    prompt and answer are kept for the next. Several sequences, beams, drafts, a cache that is given, embeddings or
    images, and a mask with holes go to the model's own ``generate``.

    Where the config evicts tokens an answer is not kept, only its prompt (`PromptCache` says how): the next turn goes
    on from there.

    Args:
        max_bytes: of all kept prompts; 0: nothing is kept.
        chunk_size: tokens of a prompt per forward; between two the client may hang up.

    Attributes:
        outcomes: calls by how they ended, and by whether their prompt was kept.
        tokens: generated tokens.
        seen: the report after the last call.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_bytes: int, chunk_size: int):
        self.model = model
        self.tokenizer = tokenizer
        self.original = model.generate
        self.max_bytes = max_bytes
        self.prompts = PromptCache(model, tokenizer, max_bytes=max_bytes or None, chunk_size=chunk_size)
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0
        self.seen: Report = report(model)
        self._turn = threading.Lock()

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        call = CALL.get() or Call()
        with self._turn, call:
            outcome = "failed"
            try:
                out = self._answer(call, input_ids, kwargs)
                outcome = "stopped" if call.stopped else "answered"
            except ClientGone:
                outcome = "stopped"
                raise
            except LongCtxError:
                outcome = "refused"
                raise
            finally:
                self.outcomes[outcome] += 1
                if state_of(self.model) is not None:
                    self.seen = report(self.model)
            return out

    def _answer(self, call: Call, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """
        Raises:
            ClientGone: before the first token.
        """
        if call.gone:
            raise ClientGone
        if call.seed is not None:
            torch.manual_seed(call.seed)
        given = kwargs | {"stopping_criteria": StoppingCriteriaList([UntilGone(call)])}
        if given.get("streamer") is not None:
            given["streamer"] = WhileListening(given["streamer"], call)
        way = "kept" if self._keeps(input_ids, kwargs) else "plain"
        self.outcomes[way] += 1
        out = self._goes_on(call, input_ids, given) if way == "kept" else self.original(input_ids, **given)
        if isinstance(out, Tensor) and input_ids is not None:
            self.tokens += out.shape[0] * (out.shape[1] - input_ids.shape[1])
        return out

    def _goes_on(self, call: Call, input_ids: Tensor, given: dict[str, Any]) -> Tensor:
        """The answer, from what was read before; prompt and answer are kept."""
        prompt = self.prompts.prefill(input_ids, stop=call.stop_reading)
        if len(prompt) < input_ids.shape[1]:
            raise ClientGone
        cache = prompt.cache
        out = self.original(input_ids, **{**given, CACHE: cache})
        if not cache.evicts:
            done = Prompt(self.model, self.tokenizer, out[0, : cache.seen + 1].cpu(), cache)
            self.prompts.add(done, after=prompt)
        return out

    def _keeps(self, input_ids: Tensor | None, given: dict[str, Any]) -> bool:
        """Whether a call is of one prompt and one answer, with nothing that a kept prompt cannot have."""
        if not self.max_bytes or input_ids is None or len(input_ids) != 1 or state_of(self.model) is None:
            return False
        others = (value for name, value in given.items() if name not in (*TAKES, "streamer", "generation_config"))
        mask = given.get("attention_mask")
        if any(value is not None for value in others) or (mask is not None and not bool(mask.all())):
            return False
        configs = [one for one in (given.get("generation_config"), self.model.generation_config) if one is not None]

        def asked(name: str) -> Any:
            return next((value for one in configs if (value := getattr(one, name, None)) is not None), None)

        changes = any(asked(name) not in harmless for name, harmless in STORED.items())
        changes = changes or any(asked(name) for name in (*ONE_ROW, "return_dict_in_generate"))
        several = any((asked(name) or 1) > 1 for name in ALONE)
        return not changes and not several and asked("cache_implementation") is None
