"""Requests of continuous batching that come and go: their answers, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from helpers.batches import (
    all_free,
    alone,
    batched,
    no_collection,  # noqa: F401 - a fixture
    patched,
    prompts,
    session,
    take,
    tokens,
    until,
)

from hf_longctx.model.modules import language_model

pytestmark = pytest.mark.usefixtures("no_collection")
SCHEDULERS = ("fifo", "prefill_first")
ROLES = ("mixed", "retrieval", "streaming")


@pytest.mark.quick
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_requests_come_while_others_run(scheduler):
    arrive(scheduler, seed=0, count=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 13))
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_order_of_requests(scheduler, seed):
    arrive(scheduler, seed, count=14)


def arrive(scheduler: str, seed: int, count: int) -> None:
    """Requests of random lengths, each given when the others have answered some tokens; a third is taken back."""
    pick = random.Random(seed)
    model = patched(pick.choice(ROLES))
    given = prompts(*(pick.choice((1, 2, 17, 40, 90, 150)) for _ in range(count)), seed=seed)
    new = [pick.choice((1, 2, 9, 20)) for _ in given]
    gone = {f"req_{at}" for at in range(count) if pick.random() < 1 / 3}
    wanted = [alone(model, [one], count)[0] for one, count in zip(given, new, strict=True)]
    asked = {"num_blocks": pick.choice((45, 200)), "max_batch_tokens": pick.choice((9, 64))}
    with session(model, scheduler_type=scheduler, **asked) as manager:
        names = []
        for prompt, most in zip(given, new, strict=True):
            names.append(manager.add_request(prompt, max_new_tokens=most))
            before = steps(manager)
            for name in sorted(gone & set(names)) if pick.random() < 0.3 else ():
                manager.cancel_request(name)
            pause = pick.randrange(4)
            until(lambda least=before + pause: idle(manager) or steps(manager) >= least, "a step")
        for name in gone:
            manager.cancel_request(name)
        stay = [name for name in names if name not in gone]
        found = tokens(take(manager, stay))
        assert found == [wanted[names.index(name)] for name in stay]
        assert nothing_stays(manager)


def steps(manager) -> int:
    return getattr(manager, "current_batch", 0)  # since its thread runs


def idle(manager) -> bool:
    queues = manager.input_queue.empty() and manager.cancel_queue.empty()
    return queues and not manager.batch_processor.has_pending_requests()


def nothing_stays(manager) -> bool:
    until(lambda: idle(manager), "all requests ended")
    with manager.pause():
        return all_free(manager.cache)


@pytest.mark.parametrize("roles", ROLES)
def test_cancelled_requests_give_their_pages_back(roles):
    """One while it answers, one in the middle of its prompt, one that waits."""
    model = patched(roles)
    given = prompts(30, 500, 20, 40)
    with session(model, max_batch_tokens=32, max_requests_per_batch=2, num_blocks=800) as manager:
        names = [
            manager.add_request(one, max_new_tokens=most) for one, most in zip(given, (3000, 9, 8, 8), strict=True)
        ]
        manager.add_request(given[0], "waits", max_new_tokens=3000)
        until(lambda: manager.cache.nbytes > 0 and steps(manager) > 2, "two at once")
        for name in (*names[:2], "waits", "unknown"):
            manager.cancel_request(name)
        assert tokens(take(manager, names[2:])) == alone(model, given[2:])
        assert nothing_stays(manager)
        assert manager.get_result(timeout=0.05) is None, "a cancelled request has no output"


def test_a_request_that_waits_for_cancelled_ones_runs():
    """Pages that a request lost are kept for those that run, until one ends: a cancelled one ends too."""
    model = patched("retrieval")
    given = prompts(60, 60, 60)
    with session(model, 90, page_size=4, num_blocks=60, max_batch_tokens=200, allow_block_sharing=False) as manager:
        names = manager.add_requests(given)
        until(lambda: manager.batch_processor.scheduler.block_new_requests, "pages run out")
        with manager.pause():
            waiting = list(manager.batch_processor.scheduler.waiting_requests)
            gone = [name for name in names if name not in waiting]
        assert waiting and gone
        for name in gone:
            manager.cancel_request(name)
        wanted = [alone(model, [given[names.index(name)]], 90)[0] for name in waiting]
        assert tokens(take(manager, waiting)) == wanted


def test_a_prompt_that_never_fits_ends_alone():
    model = patched()
    given = prompts(9, 300, 20)
    short, long, other = batched(model, given, page_size=8, num_blocks=10)
    assert tokens([short, other]) == alone(model, [given[0], given[2]])
    assert long.error.startswith("a prompt of 300 tokens, which the cache of continuous batching has not enough pages")
    assert "num_blocks=10 of page_size=8" in long.error and not long.generated_tokens
    again = batched(model, given, page_size=8, num_blocks=40)
    assert tokens(again) == alone(model, given), "what the sentence says works"


def test_an_answer_that_outgrows_the_cache_ends_alone():
    model = patched("retrieval")
    given = prompts(9, 60, 20)
    with session(model, page_size=8, num_blocks=10) as manager:
        names = [manager.add_request(one, max_new_tokens=most) for one, most in zip(given, (8, 200, 8), strict=True)]
        short, long, other = take(manager, names)
        assert tokens([short, other]) == alone(model, [given[0], given[2]])
        assert long.error.startswith("a request of 81 tokens, which the cache") and "max_new_tokens" in long.error
        assert long.generated_tokens == alone(model, [given[1]], 21)[0], "21 tokens were answered in 80 slots"
        assert tokens(take(manager, [manager.add_request(given[0])])) == alone(model, given[:1]), "and it goes on"
        assert nothing_stays(manager)


def test_a_prompt_without_tokens_ends_alone():
    empty, other = batched(patched(), [[], *prompts(9)])
    assert empty.error == "a request without tokens: a prompt has at least one."
    assert len(tokens([other])[0]) == 8


def test_answers_end_where_they_should():
    model = patched()
    given = prompts(30, 90, 1)
    ends = [answer[at] for at, answer in enumerate(alone(model, given, 20), 4)]
    found = tokens(batched(model, given, 20, {"eos_token_id": ends}))
    assert found == [up_to(one, ends) for one in alone(model, given, 20)]
    assert all(len(one) < 20 for one in found)


def up_to(answer: list[int], ends: list[int]) -> list[int]:
    return answer[: next(at for at, token in enumerate(answer, 1) if token in ends)]


def test_no_end_is_taken_from_the_models_config():
    """As in generate(), and in continuous batching of a model that is not patched."""
    model = patched()
    given = prompts(30)
    (wanted,) = alone(model, given, 20)
    model.config.eos_token_id = wanted[4]
    assert tokens(batched(model, given, 20)) == [wanted]
    assert model.generation_config.eos_token_id is None, "nothing was written into the caller's config"


def test_streaming_outputs_come_one_by_one():
    model = patched()
    given = prompts(90)
    with session(model, max_batch_tokens=40) as manager:
        name = manager.add_request(given[0], streaming=True)
        seen = [one.generated_tokens for one in manager.request_id_iter(name)]
    (wanted,) = alone(model, given)
    assert seen == [wanted[:length] for length in range(1, 9)]


def test_outputs_of_a_handler_come_one_by_one():
    model = patched()
    given = prompts(30, 90, 1)
    seen = {f"user {at}": [] for at in range(3)}

    async def serve(manager) -> None:
        ended = [asyncio.get_running_loop().create_future() for _ in given]
        for (name, own), one, end in zip(seen.items(), given, ended, strict=True):

            def take_one(output, own=own, end=end):
                own.append(output.generated_tokens)
                if output.is_finished():
                    end.set_result(None)

            manager.register_result_handler(name, take_one)
            manager.add_request(one, request_id=name, streaming=True)
        await asyncio.wait_for(asyncio.gather(*ended), 20)

    with session(model) as manager:
        asyncio.run(serve(manager))
    for own, wanted in zip(seen.values(), alone(model, given), strict=True):
        assert own == [wanted[:length] for length in range(1, 9)]


def test_a_seed_draws_the_same_tokens():
    model = patched()
    given = prompts(30, 90, 1)
    one, again, other = (
        tokens(batched(model, given, 8, {"do_sample": True, "temperature": 1.5}, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_every_request_has_its_own_processors():
    model = patched()
    given = prompts(30, 90, 1, 40)
    asked = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95}
    with session(model, generation=asked, per_request_processors=True, seed=5) as manager:
        own = ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 50.0})
        names = [manager.add_request(one, **more) for one, more in zip(given, own, strict=True)]
        found = tokens(take(manager, names))
    wanted = alone(model, given)
    assert [a == b for a, b in zip(found, wanted, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize("roles", ROLES)
def test_several_answers_to_one_prompt(roles):
    """The prompt is read once; its copies go on with pages of their own."""
    model = patched(roles)
    given = prompts(1, 9, 64)
    found = batched(model, given, generation={"do_sample": True, "top_k": 1, "num_return_sequences": 3})
    assert tokens(found) == [answer for answer in alone(model, given) for _ in range(3)]
    apart = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    found = tokens(batched(model, given, generation=apart, seed=1))
    assert len({tuple(one) for one in found}) == 9
    kept = logprobs_hold(model, given, apart)
    assert kept < 1e-4, "no copy read what another one wrote"


def logprobs_hold(model, given, apart) -> float:
    """The largest difference of their logprobs from those of a forward."""
    found = batched(model, given, generation=apart, seed=2, return_logprobs=True)
    worst = 0.0
    for at, one in enumerate(found):
        prompt = given[at // 3]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + one.generated_tokens])).logits[0, len(prompt) - 1 : -1] / 3.0
        right = scores.log_softmax(-1).gather(1, torch.tensor(one.generated_tokens)[:, None])[:, 0]
        worst = max(worst, (right - torch.tensor(one.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize(("roles", "read"), [("retrieval", [202, 201 - 200, 100 - 96]), ("mixed", [202, 201, 100])])
def test_what_begins_alike_is_read_once_where_all_heads_keep_it(roles, read):
    model = patched(roles)
    (start,) = prompts(200)
    given = [[*start, 5, 6], [*start, 7], start[:100]]
    counted = []
    language_model(model).register_forward_pre_hook(
        lambda base, args, given: counted.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found, seen = [], []
    with session(model, page_size=8, max_batch_tokens=256) as manager:
        for one in given:
            before = len(counted)
            found += tokens(take(manager, [manager.add_request(one)]))
            seen.append(sum(counted[before:]) - 7)  # and each new token but the last
    assert seen == read
    assert found == alone(model, given)
