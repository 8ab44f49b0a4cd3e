"""A digest of what an evaluation asks, by which a run that goes on knows its own records."""

from __future__ import annotations

import hashlib

import numpy as np

from ..tasks.haystack import TextHaystack
from ..tasks.language import Language
from .plan import Case, EvalPlan


def prompts_digest(plan: EvalPlan, language: Language) -> str:
    """Digest of the prompts and of the perplexity text: another tokenizer, filler or draw gives another one.

    Of the user's own texts all are in it, with their answers.
    """
    digest = hashlib.sha256()
    if isinstance(language.haystack, TextHaystack):  # the prompts below are a few pieces of it
        digest.update(language.haystack.ids.astype("<i8").tobytes())
    cases = [case for case in plan.cases if isinstance(case, Case)]
    own = [case for case in cases if case.task.own]
    for case in [*{case.task: case for case in reversed(cases) if not case.task.own}.values(), *own]:
        sample = case.sample(language)
        for ids in (sample.context, *(question.prompt for question in sample.questions)):
            digest.update(np.asarray(ids, dtype="<i8").tobytes())
        if case.task.own:
            digest.update(repr([question.answers for question in sample.questions]).encode())
    if plan.text is not None:
        digest.update(plan.text.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]
