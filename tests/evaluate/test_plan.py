"""What an evaluation runs, and that nothing wrong gets past its start."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers.tiny import config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import ConfigError, LongCtxConfig
from hf_longctx.assets import asset
from hf_longctx.config.words import load, make, words
from hf_longctx.evaluate.digest import prompts_digest
from hf_longctx.evaluate.plan import Case, Options, cases_of, make_plan, values_of, variants_of
from hf_longctx.evaluate.run import evaluate
from hf_longctx.model.modules import state_of
from hf_longctx.stores.evicted import Budget
from hf_longctx.tasks import tasks_from
from hf_longctx.tasks.language import language_for

SMALL = {"lengths": [256, 128], "depths": [0, 1], "samples": 2}


@pytest.fixture(scope="module")
def llama():
    path = asset("tiny-llama")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def plan_of(llama, tasks="needle,key_value", config="auto", sweep=None, text=None, **options):
    model, tokenizer = llama
    return make_plan(
        model, language_for(tokenizer), tasks_from(tasks), make(Options, SMALL | options), config, sweep, text
    )


def test_every_task_length_depth_and_number_once_short_ones_first(llama):
    plan = plan_of(llama)
    found = [(case.task.name, case.length, case.depth, case.number) for case in plan.cases]
    assert sorted(found) == sorted(itertools.product(("needle", "key_value"), (128, 256), (0.0, 1.0), (0, 1)))
    assert len({case.key for case in plan.cases}) == 16
    assert [case.length for case in plan.cases] == [128] * 8 + [256] * 8
    assert plan.keys() == {(name, case.key) for name in ("dense", "patched") for case in plan.cases}
    assert state_of(llama[0]) is None


def test_a_task_without_depth_is_run_once_per_length_and_number():
    tasks = tasks_from("common_words,needle")
    cases = list(cases_of(tasks, make(Options, SMALL)))
    assert [case.depth for case in cases if case.task.name == "common_words"] == [None] * 4
    assert sum(case.task.name == "needle" for case in cases) == 8
    anywhere = list(cases_of(tasks, make(Options, SMALL | {"depths": []})))
    assert [case.depth for case in anywhere] == [None] * 8


def test_a_prompt_depends_on_its_own_case_alone(llama):
    language = language_for(llama[1])

    def prompts(**options):
        return {case.key: case.sample(language) for case in plan_of(llama, **options).cases}

    few, more = (
        prompts(),
        prompts(samples=3, lengths=[64, 128, 256], depths=[0, 0.5, 1], tasks="passkey,needle,key_value"),
    )
    assert set(few) < set(more)
    assert all(np.array_equal(sample.context, more[key].context) for key, sample in few.items())
    assert all(sample.length == case.length for sample, case in zip(few.values(), plan_of(llama).cases, strict=True))
    facts = [sample.questions[0].answers for key, sample in more.items() if key.startswith("needle")]
    assert len(set(facts)) == len(facts) == 27, "an interval over cases needs independent ones"
    other = prompts(seed=1)
    assert not any(np.array_equal(sample.context, other[key].context) for key, sample in few.items())


def test_the_digest_tells_prompts_and_texts_apart(llama):
    language = language_for(llama[1])
    text = torch.arange(3, 60)
    plans = [plan_of(llama), plan_of(llama, seed=1), plan_of(llama, text=text), plan_of(llama, text=text + 1)]
    plans.append(plan_of(llama, tasks="needle"))
    found = [prompts_digest(plan, language) for plan in plans]
    assert len(set(found)) == len(plans)
    assert found[0] == prompts_digest(plan_of(llama), language)


def test_tasks_of_one_word_draw_prompts_of_their_own(llama):
    """An interval over all tasks needs independent prompts; only the task's word is part of its own draw."""
    language = language_for(llama[1])
    tasks = "needle,needle:metric=exact_match,needle:variant=multi_key"
    samples = [case.sample(language) for case in plan_of(llama, tasks=tasks).cases]
    facts = [sample.questions[0].answers for sample in samples]
    assert len(facts) == 3 * 8 and len(set(facts)) == len(facts)
    assert len({tuple(sample.context[-20:]) for sample in samples}) == len(samples)


def test_the_digest_is_of_the_whole_filler(llama, tmp_path):
    """A resumed run must notice a change in a part that the few prompts of the digest do not hold."""
    model, tokenizer = llama
    path, told = tmp_path / "text.txt", []
    for last in ("the", "of"):
        path.write_text("the and " * 40000 + last)
        language = language_for(tokenizer, text=path)
        plan = make_plan(model, language, tasks_from("needle"), make(Options, SMALL), "auto")
        told.append((prompts_digest(plan, language), [case.sample(language).context.tolist() for case in plan.cases]))
    assert told[0][1] == told[1][1] and told[0][0] != told[1][0]


def test_the_windows_of_a_text_score_every_token_once(llama):
    plan = plan_of(llama, text=torch.arange(150) + 3, perplexity_window=40)
    windows = sorted((case for case in plan.cases if case.key.startswith("text")), key=lambda case: case.begin)
    assert [token for one in windows for token in range(one.scored, one.end)] == list(range(1, 150))
    assert max(one.length for one in windows) == 40
    short = [case for case in plan_of(llama, text=torch.arange(150) + 3).cases if case.key.startswith("text")]
    assert [one.length for one in short] == [150], "the longest length, or the text where that is shorter"


def test_variants_of_a_sweep(llama):
    own, *_ = (variant.config for variant in plan_of(llama).variants[1:])
    swept = plan_of(llama, sweep="retrieval_fraction=0.125,0.25,0.5").variants
    assert [variant.name for variant in swept] == [
        "dense",
        "patched",
        "retrieval_fraction=0.125",
        "retrieval_fraction=0.5",
    ]
    assert [variant.swept for variant in swept] == [None, 0.25, 0.125, 0.5], "patched has one of the values already"
    assert [swept[0].config, swept[1].config] == [None, own]
    assert swept[3].config == own.override(heads={"retrieval_fraction": 0.5})
    recent = plan_of(
        llama, sweep="stores.streaming={store: sink_recent, recent: 16},{store: sink_recent, recent: 32}"
    ).variants
    assert [variant.config.stores.streaming.recent for variant in recent[1:]] == [64, 16, 32]
    assert recent[3].swept == {"store": "sink_recent", "recent": 32}


def test_a_pattern_can_be_swept_by_its_word(llama):
    found = [word for word in words("prefill") if "retrieval" in load("prefill", word).roles and word != "dense"]
    assert {"antidiagonal", "block_topk", "flexprefill", "vertical_slash"} <= set(found)
    sweep = f"prefill.retrieval.pattern={','.join(found)}"
    variants = variants_of(llama[0], "auto", sweep)
    assert [variant.swept for variant in variants[2:]] == found
    assert [type(variant.config.prefill.retrieval) for variant in variants[2:]] == [load("prefill", w) for w in found]


def test_a_budget_is_swept_in_shares_and_in_tokens(llama):
    own = plan_of(llama).variants[1].config
    swept = variants_of(llama[0], "auto", "budget=0.5,0.25,128,1.0")[1:]
    assert [variant.name for variant in swept] == ["patched", *(f"budget={x}" for x in (0.5, 0.25, 128, 1.0))]
    assert [variant.swept for variant in swept] == [None, 0.5, 0.25, 128, 1.0]
    budgets = [variant.config.stores.retrieval.budget for variant in swept[1:]]
    assert budgets == [Budget(share=0.5), Budget(share=0.25), Budget(tokens=128), Budget(share=1.0)]
    assert swept[0].config == own and swept[1].config == own.override(stores={"retrieval": {"store": "evicted"}})


def test_a_sweep_changes_an_eviction_in_its_budget_alone(llama):
    store = {"store": "evicted", "rule": {"score": "key_norm"}, "budget": {"tokens": 128}, "by": "uniform"}
    config = LongCtxConfig.from_dict({**plan_of(llama).variants[1].config.to_dict(), "stores": {"retrieval": store}})
    _, own, *swept = variants_of(llama[0], config, "budget=0.5,128")
    assert own.swept == 128, "patched has one of the values already"
    want = config.override(stores={"retrieval": {"budget": {"share": 0.5}}})
    assert [variant.config for variant in swept] == [want] and want.stores.retrieval.by == "uniform"
    scores = variants_of(llama[0], config, "stores.retrieval.rule.score=snapkv,tova")[2:]
    assert [type(variant.config.stores.retrieval.rule).__name__ for variant in scores] == ["Snapkv", "Tova"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": "neddle"}, "needle"),
        ({"tasks": "needle:metric=exact"}, "exact_match"),
        ({"tasks": "needle,needle"}, "twice"),
        ({"tasks": "common_words"}, "language"),
        ({"tasks": "needle:questoins=2"}, "questions"),
        ({"length": [128]}, "lengths"),
        ({"lengths": []}, "none given"),
        ({"lengths": [128, 128]}, "given twice"),
        ({"lengths": [4]}, "needs at least"),
        ({"lengths": ["many"]}, "lengths"),
        ({"depths": [1.5]}, "depths"),
        ({"samples": 0}, "samples"),
        ({"mode": "turn"}, "turns"),
        ({"config": "tiny-lama"}, "tiny-llama"),
        ({"config": "tiny-qwen3"}, "another model"),
        ({"sweep": "retrieval_fractoin=0.5"}, "retrieval_fraction"),
        ({"sweep": "recent=64"}, "stores.streaming.recent"),
        ({"sweep": "model.head_dim=64"}, "section"),
        ({"sweep": "retrieval_fraction"}, "expected values"),
        ({"sweep": "retrieval_fraction=0.5,0.5"}, "the same config"),
        ({"sweep": "retrieval_fraction=2"}, "retrieval_fraction"),
        ({"sweep": "kernel=auto,fast"}, "kernel"),
        ({"sweep": "budget=0.5,1.5"}, "stores.retrieval.budget.share: got 1.5"),
        ({"sweep": "budget=0.5,half"}, "stores.retrieval.budget: got 'half'"),
        ({"sweep": "budget=0.5,30"}, "budget.tokens: got 30, expected at least the 68"),
        ({"sweep": "budget=0.5,1,1.0"}, "budget=1.0 gives the same config as budget=1"),
        ({"perplexity": "nowhere.txt"}, "perplexity"),
        ({"perplexity": "book"}, "perplexity: the embedded models' language has no words for the book"),
        ({"perplexity_window": 64}, "perplexity_window: there is no text"),
        ({"lengths": [128, 40000], "tasks": "key_value"}, "more than the 4096 different notes"),
        ({"chat": True}, "chat"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(llama, tmp_path, monkeypatch, given, said):
    model, tokenizer = llama
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(ConfigError, match=said):
        evaluate(model, tokenizer, tmp_path / "out", **({"tasks": "needle"} | SMALL | given))
    assert not list(tmp_path.rglob("*.jsonl"))
    assert state_of(model) is None


def test_every_length_and_depth_is_tried_at_the_start():
    """A length that one task of several has no room for is found, though the others come first."""
    model = tiny_model()
    language = language_for(byte_bpe())
    tasks = tasks_from("passkey,key_value:questions=40")
    options = make(Options, {"lengths": [128, 4096]})
    with pytest.raises(ConfigError, match="key_value:questions=40 needs at least"):
        make_plan(model, language, tasks, options, config_for(model))


def test_a_draw_without_room_is_found_at_the_start(monkeypatch):
    """Where there is hardly any room, every draw is tried; elsewhere one is enough."""
    model, language = tiny_model(), language_for(byte_bpe(259))

    def plan(length, samples):
        options = make(Options, {"lengths": [length, 2000], "depths": [], "samples": samples})
        return make_plan(model, language, tasks_from("needle"), options, config_for(model))

    def fits(length):
        with contextlib.suppress(ConfigError):
            return plan(length, 1)

    least = next(filter(fits, range(200, 300)))  # the length is part of the draw
    assert not fits(200)
    with pytest.raises(ConfigError, match="needs at least"):
        plan(least, 40)
    drawn = []
    real = Case.sample
    monkeypatch.setattr(Case, "sample", lambda self, language: drawn.append(self.number) or real(self, language))
    plan(2 * least, 40)
    assert {*drawn} <= {0, 39} and len(drawn) == 3


def test_a_budget_does_not_replace_another_store(llama):
    config = plan_of(llama).variants[1].config.override(stores={"retrieval": {"store": "quantized"}})
    with pytest.raises(ConfigError, match="budget=0.5 is a budget of evictions, and stores.retrieval.*'quantized'"):
        variants_of(llama[0], config, "budget=0.5")


def test_options_and_their_fields_are_plain():
    assert {field.name for field in dataclasses.fields(Options)} == {
        *("lengths", "depths", "samples", "seed", "mode", "answers", "prefill_chunk_size", "perplexity_window")
    }
    assert list(values_of("kernel=cpu,stock")) == [
        ("kernel=cpu", "cpu", {"kernel": "cpu"}),
        ("kernel=stock", "stock", {"kernel": "stock"}),
    ]
    assert "kernel" in {field.name for field in dataclasses.fields(LongCtxConfig)}
