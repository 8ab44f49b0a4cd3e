"""Assisted decoding where a prompt is read otherwise than decoded tokens: drafts are kept out of what is a prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cache.plan import FEWEST


class DraftsApart:
    """Replaces ``get_candidates`` of one of Transformers' candidate generators.

    Transformers reads the first drafts in one forward with the prompt: they would be its last tokens, by which patterns
    choose and which a dense tail is of. So the first forward is the prompt's alone. A later one verifies fewer tokens
    than make a prompt. Drafts that are left out count as rejected; they change no answer.
    """

    def __init__(self, generator: Any):
        self.original = generator.get_candidates
        # These make drafts of what the model returned, so they have none for the first forward.
        self.prompt_is_read = getattr(generator, "requires_model_outputs", False)

    def __call__(self, input_ids: Tensor, *given: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Ids ``[B, T + drafts]``, and the drafts' logits ``[B, drafts, V]`` or None."""
        # The first time too: an assistant reads its prompt there.
        ids, logits = self.original(input_ids, *given, **kwargs)
        if not self.prompt_is_read:
            self.prompt_is_read = True
            return input_ids, None
        most = FEWEST - 2  # verified together with the last token
        return ids[:, : input_ids.shape[1] + most], logits if logits is None else logits[:, :most]
