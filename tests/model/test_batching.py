"""Continuous batching of a patched model answers what its generate() does."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.batches import alone, batched, no_collection, patched, prompts, session, take, tokens  # noqa: F401
from helpers.every_family import CASES, softmax_in_float64
from helpers.every_family import tiny_model as any_model
from helpers.tiny import config_for
from transformers.generation.continuous_batching.requests import RequestState

from hf_longctx import patch_model, report
from hf_longctx.kernels import native
from hf_longctx.kernels.base import Case
from hf_longctx.model.modules import language_model
from hf_longctx.model.patch import unpatched

pytestmark = pytest.mark.usefixtures("no_collection")
ROLES = ("mixed", "retrieval", "streaming", "by layer")
GIVEN = prompts(1, 55, 31, 3, 90)


@pytest.mark.quick
@pytest.mark.parametrize("roles", ROLES)
def test_tokens_are_those_of_generate(roles):
    """Prompts come in chunks of a step that has 17 tokens; five are read and answered at once."""
    model = patched(roles)
    assert tokens(batched(model, GIVEN, max_batch_tokens=17)) == alone(model, GIVEN)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(family):
    model = patched(family=family, dtype=torch.float64)
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)


def test_a_dense_model_answers_otherwise():
    """A control: the roles are seen in these tokens."""
    model = patched()
    answers = tokens(batched(model, GIVEN))
    with unpatched(model):
        dense = alone(model, GIVEN)
    same = [a == b for a, b in zip(answers, dense, strict=True)]
    assert same[0] and not same[1] and not same[4], "short prompts alone lose nothing"


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_window_that_is_off_by_one_is_seen_in_the_logprobs(off):
    model, other = patched(), patched(recent=20 + off)
    given = prompts(60, 41)
    found = batched(other, given, return_logprobs=True)
    for one, prompt in zip(found, given, strict=True):
        assert len(one.logprobs) == len(one.generated_tokens) == 8
        error = max(
            abs(a - b) for a, b in zip(one.logprobs, logprobs(model, prompt, one.generated_tokens), strict=True)
        )
        assert (error < 1e-4) is (off == 0), error


def logprobs(model, prompt: list[int], answer: list[int]) -> list[float]:
    """Of these tokens after the prompt, by one forward."""
    with torch.no_grad():
        found = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return found.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def test_bfloat16_chooses_a_likeliest_token():
    """Steps of other sizes round otherwise, so that a token may differ; but never by more than rounding."""
    model, exact = patched(dtype=torch.bfloat16), patched(dtype=torch.bfloat16).double()
    for one, prompt in zip(tokens(batched(model, GIVEN)), GIVEN, strict=True):
        with torch.no_grad():
            found = exact(torch.tensor([prompt + one])).logits[0, len(prompt) - 1 : -1]
        below = found.max(-1).values - found.gather(1, torch.tensor(one)[:, None])[:, 0]
        assert below.max() < 0.05 * found.std()


@pytest.mark.parametrize("page", [4, 31, 256])
def test_any_page_size(page):
    model = patched()
    assert tokens(batched(model, GIVEN, page_size=page, num_blocks=4 + 600 // page)) == alone(model, GIVEN)


@pytest.mark.parametrize(("kv_heads", "roles"), [(1, ["R", "S"]), (3, "mixed")])
def test_few_or_odd_kv_heads(kv_heads, roles):
    model = patched(roles, kv_heads=kv_heads)
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference", "stock"])
def test_kernels(kernel):
    lacks = native.supports(Case(torch.device("cpu"), torch.float32, 16))
    if kernel == "native" and lacks:
        pytest.skip(lacks)
    model = patched(top={"kernel": kernel})
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)
    ran = report(model).kernels
    in_blocks = bool(lacks) or kernel in ("cpu", "reference")
    assert kernel in ran and ("streamed" in ran) is in_blocks, "native alone reads pages where they lie"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_native_library():
    model = patched()
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)
    assert report(model).kernels == ("cpu", "streamed")


def test_no_slot_is_read_that_no_token_was_written_to():
    model = patched()
    with session(model) as manager:
        manager.cache.cache_tensor.view(torch.float32).fill_(float("nan"))
        assert tokens(take(manager, manager.add_requests(GIVEN))) == alone(model, GIVEN)


def pressed(monkeypatch) -> list[str]:
    """Names of requests that lost their pages and begin again."""
    again = []
    anew = RequestState.create_equivalent_initial_request

    def noted(state):
        again.append(state.request_id)
        return anew(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
    return again


@pytest.mark.parametrize("roles", ["mixed", "retrieval"])
@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_requests_that_lose_their_pages_answer_the_same(scheduler, roles, monkeypatch):
    again = pressed(monkeypatch)
    model = patched(roles)
    found = batched(model, GIVEN, 40, num_blocks=28, scheduler_type=scheduler, max_batch_tokens=40)
    assert tokens(found) == alone(model, GIVEN, 40)
    assert again, "a control: there was too little memory"


PATTERN = {"pattern": "vertical_slash", "vertical": 3, "slash": 2}
TAIL = {"pattern": "sink_recent", "dense_tail": 40}
SPARSE = {"prefill": {"retrieval": PATTERN, "min_tokens": 0, "streaming": TAIL}}


def test_sparse_prefill_and_dense_tail():
    """Of prompts that fit a step; the report says what ran, as after generate()."""
    given = prompts(300, 150, 90)
    asked = {"page_size": 16, "max_batch_tokens": 1024}
    model = patched(dtype=torch.float64, top=SPARSE)
    want = alone(model, given)
    before = report(model)
    again = patched(dtype=torch.float64, top=SPARSE)
    assert tokens(batched(again, given, **asked)) == want
    after = report(again)
    for name in ("sparse", "dense", "density", "tails", "tail_tokens"):
        assert getattr(after, name) == getattr(before, name) > 0, name
    without = tokens(batched(patched(dtype=torch.float64), given, **asked))
    assert without[0] != want[0], "a control"


def test_the_tail_of_a_part_of_a_prompt_is_noted():
    model = patched(top=SPARSE)
    batched(model, prompts(400), page_size=16, max_batch_tokens=200)
    assert any("dense tail: some prompts were read in several forwards" in note for note in report(model).notes)


PAGES = ((4, 300), (5, 17), (31, 17), (256, 300))  # and tokens of a step


def wide() -> list[tuple]:
    kinds = itertools.product(("llama", "mistral", "qwen2", "qwen3"), ROLES)
    return [(*kind, *PAGES[(at + more) % 4]) for at, kind in enumerate(kinds) for more in (0, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "roles", "page", "step"), wide())
def test_every_mix(family, roles, page, step):
    model = patched(roles, family, layers=3)
    given = prompts(1, 55, 90, 31, 127, 3, 64, 140)
    found = batched(model, given, 12, page_size=page, num_blocks=4 + 2000 // page, max_batch_tokens=step)
    assert tokens(found) == alone(model, given, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "blocks"), [(4, 46), (8, 24), (16, 13), (31, 8)])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_every_mix_in_little_memory(scheduler, roles, page, blocks):
    model = patched(roles)
    given = prompts(1, 55, 90, 31, 127, 3, 64, 140)
    asked = {"page_size": page, "num_blocks": blocks, "max_batch_tokens": 40, "scheduler_type": scheduler}
    assert tokens(batched(model, given, 30, **asked)) == alone(model, given, 30)


@pytest.mark.slow
@pytest.mark.parametrize("case", [one for one in CASES if not one.window], ids=str)
def test_every_family_without_windows(case, monkeypatch):
    softmax_in_float64(monkeypatch)
    model = any_model(case)
    text = language_model(model)
    patch_model(model, config_for(text, "mixed"))
    given = prompts(1, 55, 20, 33, vocab=min(97, text.config.vocab_size))
    assert tokens(batched(model, given, 6, max_batch_tokens=37)) == alone(model, given, 6)
