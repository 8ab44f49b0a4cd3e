"""Made-up evaluations: a plan, its records and their headers."""

from __future__ import annotations

from collections.abc import Callable

from hf_longctx.config.config import load_shipped
from hf_longctx.config.words import make
from hf_longctx.evaluate.plan import Case, EvalPlan, Options, Variant, Window, cases_of
from hf_longctx.tasks import tasks_from

EVIL = "<script>alert('said')</script><img src=x onerror=alert(1)>"
CONFIG = load_shipped("tiny-llama")
SWEPT = ("dense", "patched", "recent=16", "recent=32", "recent=128")


def plan_of(
    names=("dense", "patched"),
    tasks="needle,key_value:questions=2,common_words",
    text=True,
    lengths=(512, 2048, 16384),
    samples=2,
) -> EvalPlan:
    variants = [Variant(names[0]), *(Variant(name, CONFIG, name.partition("=")[2] or None) for name in names[1:])]
    options = make(Options, {"lengths": list(lengths), "depths": [0, 0.5, 1], "samples": samples})
    windows = [Window(0, 1, 40), Window(20, 40, 60)] if text else []
    return EvalPlan(tuple(variants), (*cases_of(tasks_from(tasks), options), *windows), options)


def falling(v: int, c: int, case: Case) -> float:
    """A score for variant number v and case number c; each variant is a fifth below the one before."""
    return max(0.0, 1 - 0.2 * v - 0.01 * (c % 7))


def records_of(plan: EvalPlan, score: Callable[[int, int, Case], float] = falling) -> list[dict]:
    """Made-up records; variant number v and case number c decide every figure."""
    found = []
    for v, variant in enumerate(plan.variants):
        for c, case in enumerate(plan.cases):
            record = {"variant": variant.name, "case": case.key}
            if isinstance(case, Window):
                parts = [{"begin": 0, "end": 256, "nll": 500.0, "tokens": 255}]
                parts += [{"begin": 256, "end": 512, "nll": 100.0 + 10 * v, "tokens": 50}] * (c % 2)
                found.append(record | {"nll": 10.0 + v, "tokens": case.end - case.scored, "by_position": parts})
                continue
            scored = float(score(v, c, case))
            found.append(
                record
                | {
                    "task": case.task.name,
                    "length": case.length,
                    "depth": case.depth,
                    "score": scored,
                    "scores": [scored],
                }
                | {"outputs": [EVIL], "expected": [["an & answer"]], "questions": [EVIL * 40], "output_ids": [[1]]}
                | {
                    "cache_bytes": 1000 * case.length // (1 + v),
                    "prefill_s": case.length / (1 + v),
                    "decode_ms": 2.0 + v,
                }
                | {
                    "expected_nll": [0.25 * (1 + v)],
                    "expected_tokens": [5],
                    "expected_right": [v == 0],
                }
                | {
                    "positions": 5,
                    "agreement": 0.8,
                    "kl": 0.1 * v,
                    "kl_max": 0.5,
                    "density": None,
                    "kernels": ["cpu"],
                    "notes": [EVIL] * v,
                }
            )
    return found


def headers_of(plan: EvalPlan, processes=1) -> list[dict]:
    on = {"hf_longctx": "1", "torch": "2", "transformers": "5", "python": "3", "cpu": "C", "threads": 1, "cores": 2}
    settings = {"dtype": "float32", "seed": 0, "answers": "greedy"}
    heads = {variant.name: [4, 16] for variant in plan.variants[1:]}
    configs = {variant.name: variant.config and variant.config.to_dict() for variant in plan.variants}
    header = {"model": EVIL, "settings": settings, "environment": on, "retrieval_heads": heads, "processes": processes}
    header["configs"] = configs
    return [header] * processes
