"""``evaluate``: tasks of many lengths and depths, dense and patched on the same prompts, written down case by case."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cache.fingerprint import weights_digest
from ..config.config import LongCtxConfig
from ..config.model import made_for
from ..config.words import dump, make
from ..errors import ConfigError
from ..identification.methods.base import modes_kept
from ..io.atomic import written_whole
from ..io.environment import environment
from ..io.processes import Processes
from ..io.progress import Progress
from ..model.modules import name_of, state_of, unwrap
from ..model.patch import patched, unpatched
from ..model.report import report
from ..tasks import tasks_from
from ..tasks.answer import end_tokens, input_device, score
from ..tasks.base import Sample, Task
from ..tasks.language import Language, language_for
from .digest import prompts_digest
from .forwards import output_head, window_losses
from .measures import NextToken, next_token
from .meter import Found, answers_of, forced_of
from .page import check_plots, write_report
from .plan import Case, EvalPlan, Options, Variant, Window, make_plan
from .positions import FIELD, by_position
from .prompts import perplexity_text, token_ids
from .records import Record, Records
from .summary import Summary, summarize

VERSIONS = ("hf_longctx", "torch", "transformers")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    tasks: str | Sequence[str | Task],
    config: str | Path | dict | LongCtxConfig | None = None,
    sweep: str | None = None,
    text: str | Path | None = None,
    haystack: str | None = None,
    chat: bool = False,
    perplexity: str | Path | None = None,
    name: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Run tasks dense and patched on the same prompts; write records, a summary and a report into the folder ``out``.

    The one model is patched and unpatched in turns, case by case. Afterwards it is as it was. Every result is on the
    disk before the next one begins: the same call goes on where a killed one was, with any number of processes.

    Args:
        model: as for ``patch_model``; patched or not.
        out: a folder; of several processes all must see the same.
        tasks: words with their fields, ``"needle,key_value:questions=2"``, or a list of such texts and task objects.
        config: what to patch with, as for ``patch_model``; None: what the model is patched with, or else "auto".
        sweep: ``"retrieval_fraction=0.1,0.25"``: one more variant for each value of a field of the config.
        text, haystack, chat: what the prompts are made of, as for ``tasks.language.language_for``.
        perplexity: a UTF-8 text whose perplexity is measured too, as for ``prompts.perplexity_text``.
        name: what to call the model in the report; None: what it was loaded from.
        progress: show how far it is on stderr: a bar, or where that is no terminal a line now and then.
        options: the fields of ``Options``: ``lengths``, ``depths``, ``samples``, ``seed`` and so on.

    Returns:
        The summary, the same on every process; it is in ``out/summary.json`` as well, the report is
        ``out/report/index.html``.

    Raises:
        ConfigError: an unknown task, field or value; a folder with another run's records; no matplotlib; or as
            ``patch_model``. All of it is noticed before anything is run.
        UnsupportedModelError, UnsupportedModeError: as ``patch_model`` and ``output_head``.
    """
    check_plots()
    chosen = tasks_from(tasks)
    settings = make(Options, options)
    language = language_for(tokenizer, haystack, text, chat)
    read = None if perplexity is None else token_ids(model, perplexity_text(perplexity, tokenizer), tokenizer)[0]
    state = state_of(model)
    if config is None:
        config = "auto" if state is None else state.config
    with modes_kept(model), unpatched(model), torch.no_grad():
        model.eval()
        processes = Processes(input_device(model))
        plan = make_plan(model, language, chosen, settings, config, sweep, read)
        book = Records(Path(out), header_of(model, language, plan, sweep, name, processes.count))
        runner = Runner(model, language, plan, output_head(model))
        runner.run(book, processes, progress and processes.main)
    processes.wait()
    return processes.share(finish(book, plan) if processes.main else None)


def finish(book: Records, plan: EvalPlan) -> Summary:
    """Write the summary and the report of a run all of whose records are there."""
    headers, records = book.read()
    if missing := plan.keys() - {(record["variant"], record["case"]) for record in records}:
        raise ConfigError(
            f"out: {book.folder} lacks {len(missing)} of {len(plan.keys())} results. Do all processes write to a "
            "folder that all of them see?"
        )
    summary = summarize(plan, records)
    with written_whole(book.folder / "summary.json") as path:
        path.write_text(json.dumps({"header": headers[0], **summary.as_dict()}, indent=1) + "\n", "utf-8")
    write_report(book.folder / "report", summary, headers, records)
    return summary


def header_of(
    model: nn.Module, language: Language, plan: EvalPlan, sweep: str | None, name: str | None, processes: int
) -> dict[str, Any]:
    """Everything the results depend on; what is under ``settings`` must not change when a run goes on."""
    device = input_device(model)
    machine = environment()
    configs = {variant.name: variant.config and variant.config.to_dict() for variant in plan.variants}
    cases = [case for case in plan.cases if isinstance(case, Case)]
    settings = {
        "model": weights_digest(unwrap(model), complete=False),
        "end tokens": sorted(end_tokens(model)),
        "dtype": str(unwrap(model).dtype).removeprefix("torch."),
        "device": device.type,
        "tasks": list(dict.fromkeys(case.task.name for case in cases)),
        **dump(plan.options),
        "prompts": prompts_digest(plan, language),
        **{f"config of {variant}": _digest(given) for variant, given in configs.items() if given is not None},
        **{f"version of {library}": machine[library] for library in VERSIONS},
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "model": name or name_of(model) or type(unwrap(model)).__name__,
        "settings": settings,
        "sweep": sweep,
        "environment": machine,
        "processes": processes,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "retrieval_heads": {
            variant.name: [variant.config.retrieval_heads, variant.config.kv_heads]
            for variant in plan.variants
            if variant.config is not None
        },
        "configs": configs,
    }


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Runner:
    """Runs cases. ``head`` makes logits of hidden states."""

    model: nn.Module
    language: Language
    plan: EvalPlan
    head: Any

    def run(self, book: Records, processes: Processes, progress: bool) -> None:
        """This process's share of what is not there yet, appended to its file."""
        done = processes.share({(r["variant"], r["case"]) for r in book.read()[1]} if processes.main else None)
        missing = {
            case: [one.name for one in self.plan.variants if (one.name, case.key) not in done]
            for case in self.plan.cases
        }
        left = [case for case in self.plan.cases if missing[case]]
        mine = left[processes.rank :: processes.count]
        before = len(done) if processes.count == 1 else 0  # of several processes each shows what it has left itself
        count = sum(len(missing[case]) for case in mine)
        tokens = sum(case.length * len(missing[case]) for case in mine)
        bar = Progress("eval", before + count, "results", shown=progress, done=before, weight=tokens)
        with book.open(processes.rank) as writer, bar:
            self.warm_up(mine)
            for number, case in enumerate(mine):
                for record in self.records(case, missing[case], number):
                    writer.append(record)
                    bar.advance(case.length, saved=True)

    def warm_up(self, cases: Sequence[Case | Window]) -> None:
        """Every variant once, so that nothing is timed that happens only the first time."""
        first = next((case for case in cases if isinstance(case, Case)), None)
        if first is not None:
            sample = first.sample(self.language)
            for variant in self.plan.variants:
                with self.way(variant):
                    self.answers(sample, None)

    def way(self, variant: Variant) -> AbstractContextManager:
        return nullcontext() if variant.config is None else patched(self.model, variant.config)

    def answers(self, sample: Sample, along: Any) -> Found:
        options = self.plan.options
        if options.answers == "forced":
            return forced_of(self.model, sample, options.mode, options.prefill_chunk_size)
        return answers_of(self.model, sample, options.mode, options.prefill_chunk_size, along)

    def records(self, case: Case | Window, missing: Collection[str], number: int) -> Iterator[Record]:
        """The records of a case that are missing.

        Dense goes first, because the others follow its answers, and is run again where its record is there already;
        the others take turns in being the next.
        """
        dense, *others = self.plan.variants
        turn = number % len(others)
        order = (dense, *others[turn:], *others[:turn])
        if isinstance(case, Window):
            yield from (self.window(case, one) for one in order if one.name in missing)
            return
        sample = case.sample(self.language)
        along = None
        base = None
        for variant in order:
            if variant is not dense and variant.name not in missing:
                continue
            with self.way(variant):
                found = self.answers(sample, along)
                told = None if variant.config is None else report(self.model)
            if variant is dense:
                along = found.said
                base = found.states
            if variant.name in missing:
                yield {
                    "variant": variant.name,
                    "case": case.key,
                    **sample.metadata,
                    **self.scored(sample, found),
                    **asdict(found.costs),
                    **({} if told is None else asdict(self.agreement(base, found))),
                    "density": told and told.density,
                    "kernels": told.kernels if told else (),
                    "notes": (*self.too_long(sample), *(told.notes if told else ())),
                }

    def too_long(self, sample: Sample) -> tuple[str, ...]:
        longest = made_for(unwrap(self.model).config)
        if longest is None or sample.length <= longest:
            return ()
        return (f"some prompts are longer than the {longest} tokens that the model was made for",)

    def agreement(self, base: Any, found: Found) -> NextToken:
        return next_token(base, found.states, self.head if found.said is not None else None)

    def scored(self, sample: Sample, found: Found) -> dict[str, Any]:
        told = {
            "expected": [question.answers for question in sample.questions],
            "questions": [self.language.decode(question.prompt) for question in sample.questions],
            "expected_nll": [one.nll for one in found.expected],
            "expected_tokens": [one.tokens for one in found.expected],
            "expected_right": [one.right for one in found.expected],
        }
        if found.said is None:
            scores = [float(one.right) for one in found.expected]
        else:
            outputs = [self.language.decode(ids) for ids in found.said]
            scores = score(sample.questions, outputs)
            told |= {"outputs": outputs, "output_ids": found.said}
        return {"score": sum(scores) / len(scores), "scores": scores, **told}

    def window(self, case: Window, variant: Variant) -> Record:
        """The text's perplexity counts each token once, that by position all that the window predicts."""
        with self.way(variant):
            losses = window_losses(self.model, self.head, self.plan.text, case.begin, case.begin + 1, case.end)
        scored = losses[case.scored - case.begin - 1 :]
        told = {"variant": variant.name, "case": case.key, "nll": scored.sum().item(), "tokens": len(scored)}
        return told | {FIELD: by_position(losses)}
