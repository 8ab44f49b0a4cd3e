"""What decode selections cost in quality: every selection over the same caches, beside reading every token.

    python examples/selection_quality.py hf-longctx/smollm2-135m-instruct --tokens 4096 --haystack book --chat \
        --out quality.jsonl

Each context is read once, densely; then every selection answers its questions over a fork of that cache, question and
expected answer token by token as in decoding (the last question of a chat is read that way). A text is gone on with in
the same way, for its perplexity. Lines that are in ``--out`` already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_longctx import observe, patch_model, report, unpatch_model
from hf_longctx.assets import embedded
from hf_longctx.bench.patterns import parse
from hf_longctx.cache.seam import CACHE, cache_of
from hf_longctx.commands._options import load_model
from hf_longctx.config.find import load_named
from hf_longctx.config.words import build
from hf_longctx.evaluate.forwards import follow, losses_along, output_head
from hf_longctx.evaluate.plan import Case
from hf_longctx.evaluate.prompts import perplexity_text
from hf_longctx.io.json_lines import json_lines
from hf_longctx.layout.segments import Segment
from hf_longctx.model.modules import language_model
from hf_longctx.tasks import tasks_from
from hf_longctx.tasks.forced import forced_over
from hf_longctx.tasks.language import language_for

TASKS = "needle:variant=multi_key:needles=8:questions=8,facts:questions=6,passkey"
DENSE = "dense"


def main() -> None:
    options = arguments()
    model, tokenizer = load_model(embedded(options.model), options.dtype, torch.device("cpu"))
    language = language_for(tokenizer, options.haystack, None, options.chat)
    head = output_head(model)
    done = {line["key"] for _, line in json_lines(options.out, "--out")} if options.out.exists() else set()
    texts = [DENSE, *options.select.split(",")]
    with torch.no_grad():
        if options.mass:
            patched(model, options.config, "none", DENSE)
            _, ids, sample = next(contexts(options, language, tokenizer))
            ids = torch.cat([ids, torch.as_tensor(sample.questions[0].prompt)])
            for text, (kept, best) in masses(model, ids, texts[1:]).items():
                sys.stdout.write(f"| {text} | {kept:.3f} | {best:.3f} |\n")
            return
        for roles in options.roles.split(","):
            for name, ids, sample in contexts(options, language, tokenizer):
                keys = {text: f"{roles} | {name} | {text}" for text in texts}
                if done.issuperset(keys.values()):
                    continue
                patched(model, options.config, roles, DENSE)
                cache = cache_of(language_model(model)(ids[None, : options.tokens], use_cache=True))
                for text, key in keys.items():
                    if key in done:
                        continue
                    patched(model, options.config, roles, text)
                    model(ids[None, :1], **{CACHE: cache}, use_cache=True)  # makes the index, which forks share
                    cache.crop(options.tokens if sample is None else len(sample.context))
                    if sample is None:
                        found = continued(model, head, cache.fork(), ids, options.tokens)
                    else:
                        answers = forced_over(model, sample, cache)
                        found = {"nll": [one.nll for one in answers], "tokens": [one.tokens for one in answers]}
                        found["right"] = [one.right for one in answers]
                    told = report(model)
                    line = {"key": key, "roles": roles, "case": name, "select": text, **found, "read": told.read}
                    with options.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    sys.stderr.write(f"{key}: read {told.read}\n")
    for line in table([line for _, line in json_lines(options.out, "--out")]):
        sys.stdout.write(line + "\n")


def table(lines: list[dict]) -> list[str]:
    """One row per roles and selection, as Markdown: what it read, and how much worse than reading everything it was.

    Of questions: the mean nats that an answer takes more, and how many more or fewer are right. Of texts: the
    perplexity, over that of reading everything.
    """
    kinds = list(dict.fromkeys(kind_of(line) for line in lines))
    rows = ["| heads | select | read | " + " | ".join(kinds) + " |", "|---" * (3 + len(kinds)) + "|"]
    for roles, select in dict.fromkeys((line["roles"], line["select"]) for line in lines):
        mine = [line for line in lines if (line["roles"], line["select"]) == (roles, select)]
        reads = [line["read"] for line in mine if line["read"] is not None]
        cells = [roles, select, f"{sum(reads) / len(reads):.1%}" if reads else "all"]
        for kind in kinds:
            own = [line for line in mine if kind_of(line) == kind]
            base = {line["case"]: line for line in lines if line["roles"] == roles and line["select"] == DENSE}
            cells.append(cell(own, [base[line["case"]] for line in own if line["case"] in base], kind))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def kind_of(line: dict) -> str:
    """The task's word, or ``text``."""
    return line["case"].partition(" ")[0].partition(":")[0]


def cell(own: list[dict], base: list[dict], kind: str) -> str:
    nlls, dense = ([nll for line in some for nll in line["nll"]] for some in (own, base))
    if not own or len(nlls) != len(dense):
        return ""
    tokens = sum(count for line in own for count in line["tokens"])
    if kind == "text":
        own_loss, other = sum(nlls) / tokens, sum(dense) / tokens
        return f"{math.exp(own_loss):.2f} ({math.exp(own_loss - other):.3f}x)"
    right, before = (sum(sum(line["right"]) for line in some) for some in (own, base))
    return f"{(sum(nlls) - sum(dense)) / tokens:+.3f}, {right} of {len(nlls)} ({right - before:+d})"


def masses(model: Any, ids: torch.Tensor, texts: list[str]) -> dict[str, tuple[float, float]]:
    """Share of the attention of the last of ``ids [T]`` that selections keep, and as many best tokens would keep.

    Means over query heads and over the layers that select; no head streams.
    """
    specs = {text: build("decode", parse(text, "select", "select"), "select", "select") for text in texts}
    found: dict[str, list[tuple[float, float]]] = {text: [] for text in texts}

    def look(layer, q, k, v, scale, rows, compute) -> None:
        q, tokens = q[:, :, -1:], k.shape[2]
        scores = (q[:, :, 0].unflatten(1, (k.shape[1], -1)).float() @ k.float().transpose(2, 3)) * scale
        weights = scores.softmax(-1)  # [1, n, G, S]
        for text, spec in specs.items():
            if layer < spec.dense_layers:
                continue
            if not spec.runs(tokens):
                found[text].append((1.0, 1.0))
                continue
            chosen = spec.choose(q, spec.new_index(), [Segment(k, v, tokens)], tokens - 1, scale)
            read = chosen.blocks(tokens - 1).visible(0, 1)[:, :, 0]
            best = weights.amax(2).argsort(-1, descending=True).argsort(-1) < read.sum(-1, keepdim=True)
            found[text].append(tuple((weights * some[:, :, None]).sum(-1).mean().item() for some in (read, best)))

    with observe(model, look):
        language_model(model)(ids[None], use_cache=False)
    return {
        text: tuple(sum(column) / len(column) for column in zip(*rows, strict=True)) for text, rows in found.items()
    }


def contexts(options: argparse.Namespace, language: Any, tokenizer: Any) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """(name, token ids ``[T]``, the sample whose context they are, or None for a text that is gone on with)."""
    for number in range(options.samples):
        for task in tasks_from(options.tasks):
            sample = Case(task, options.tokens, None, number, options.seed).sample(language)
            yield f"{task.name} {number}", torch.as_tensor(sample.context), sample
    if not options.texts:
        return
    text = tokenizer(perplexity_text("book", tokenizer), return_tensors="pt").input_ids[0]
    each = options.tokens + options.follow
    for number in range(options.texts):
        yield f"text {number}", text[number * each : (number + 1) * each], None


def patched(model: Any, config: str, roles: str, select: str) -> None:
    """The model with half of its heads streaming or none, and this selection for what it decodes."""
    given = {"decode": {"retrieval": {"select": "dense"} if select == DENSE else parse(select, "select", "select")}}
    if roles == "none":
        described = load_named(config).model
        letters = ["R" * described.num_key_value_heads] * described.num_hidden_layers
        given["heads"] = {"roles": letters}
    unpatch_model(model)
    patch_model(model, config, **given)


def continued(model: Any, head: Any, cache: Any, ids: torch.Tensor, read: int) -> dict:
    """The text goes on after ``read`` tokens, each token read as a decoded one."""
    states = follow(model, cache, ids[read:-1])
    losses = losses_along(model, head, states, ids[read + 1 :])
    return {"nll": [losses.sum().item()], "tokens": [len(losses)], "right": []}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--config", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=3, help="contexts of each task")
    parser.add_argument("--texts", type=int, default=3, help="texts that are gone on with")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--roles", default="none,config", help="none: no head streams; config: those of the config")
    parser.add_argument("--select", default="page_bounds:budget=1024", help="WORD:field=value:...,...")
    parser.add_argument("--follow", type=int, default=257, help="tokens of a text that are gone on with")
    parser.add_argument("--haystack", help="sentences, book, noise")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--mass", action="store_true", help="instead: the share of the attention that is kept")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
