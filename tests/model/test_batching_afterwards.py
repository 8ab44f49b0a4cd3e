"""A patched model beside and after continuous batching: other calls, other patches, copies, threads, errors."""

from __future__ import annotations

import copy
import pickle
import threading
import time

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
from helpers.tiny import config_for

from hf_longctx import patch_model, unpatch_model
from hf_longctx.cache.paged.layers import PagedLayer
from hf_longctx.errors import UnsupportedModeError
from hf_longctx.model.batching import KEPT
from hf_longctx.model.patch import unpatched

pytestmark = pytest.mark.usefixtures("no_collection")
GIVEN = prompts(1, 60, 31)


@pytest.mark.quick
def test_generate_answers_as_before():
    model = patched()
    before = alone(model, GIVEN)
    batched(model, GIVEN)
    assert alone(model, GIVEN) == before
    assert KEPT not in vars(model) and not model.training


def test_a_manager_is_kept_for_the_next_session():
    model = patched()
    wanted = alone(model, GIVEN)
    assert tokens(batched(model, GIVEN, persistent=True)) == wanted
    manager = vars(model)[KEPT]
    assert tokens(batched(model, GIVEN, persistent=True)) == wanted
    assert vars(model)[KEPT] is manager and all_free(manager.cache)
    assert alone(model, GIVEN) == wanted
    model.destroy_cached_continuous_batching_manager()
    assert tokens(batched(model, GIVEN)) == wanted and KEPT not in vars(model)


@pytest.mark.parametrize("modes", [(True, False), (False, True), (True, True)], ids=str)
def test_a_kept_manager_runs_in_and_out_of_inference_mode(modes):
    model = patched()
    wanted = alone(model, GIVEN)
    for mode in modes:
        with torch.inference_mode(mode):
            assert tokens(batched(model, GIVEN, persistent=True)) == wanted


def test_a_kept_manager_goes_with_its_patch():
    model = patched()
    batched(model, GIVEN, persistent=True)
    manager = vars(model)[KEPT]
    patch_model(model, config_for(model, "streaming"))
    assert KEPT not in vars(model)
    wanted = alone(model, GIVEN)
    assert tokens(batched(model, GIVEN, persistent=True)) == wanted
    assert vars(model)[KEPT] is not manager
    with unpatched(model):
        assert tokens(batched(model, GIVEN)) == alone(model, GIVEN), "Transformers' own"
    assert tokens(batched(model, GIVEN)) == wanted
    unpatch_model(model)
    assert not {KEPT, "init_continuous_batching"} & set(vars(model))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_model_that_keeps_a_manager(way):
    model = patched()
    wanted = tokens(batched(model, GIVEN, persistent=True))
    other = way(model)
    assert getattr(other, KEPT) is None, "its thread and its pages belong to the first"
    assert tokens(batched(other, GIVEN, persistent=True)) == tokens(batched(model, GIVEN, persistent=True)) == wanted
    assert getattr(other, KEPT) is not getattr(model, KEPT)


def test_generate_beside_a_running_manager():
    model = patched()
    wanted = alone(model, GIVEN, 30)
    with session(model, 30) as manager:
        names = manager.add_requests(GIVEN)
        assert alone(model, GIVEN, 30) == wanted
        assert tokens(take(manager, names)) == wanted


def test_two_managers_of_one_model():
    model = patched()
    with session(model) as one, session(model, page_size=9, max_batch_tokens=20) as other:
        names = [manager.add_requests(GIVEN) for manager in (one, other)]
        found = [tokens(take(manager, own)) for manager, own in zip((one, other), names, strict=True)]
    assert found == [alone(model, GIVEN)] * 2


def test_two_models_at_once():
    models = [patched(), patched("streaming", "qwen3")]
    found = [None, None]

    def run(at: int) -> None:
        found[at] = tokens(batched(models[at], GIVEN, 20))

    threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [alone(model, GIVEN, 20) for model in models]


def test_an_error_in_a_step_reaches_every_request(monkeypatch):
    model = patched()

    def broken(self, k, v, step):
        raise UnsupportedModeError("this layer says what is wrong.")

    with monkeypatch.context() as patch:
        patch.setattr(PagedLayer, "append", broken)
        began = time.monotonic()
        found = batched(model, GIVEN)
        assert time.monotonic() - began < 10
    assert [one.error for one in found] == ["this layer says what is wrong."] * 3
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)


@pytest.mark.parametrize(
    "leave", [unpatch_model, lambda model: model.set_attn_implementation("sdpa")], ids=["un", "sdpa"]
)
def test_a_model_that_is_changed_while_a_manager_runs(leave):
    """It never reads pages by another rule: the request ends with what to do."""
    model = patched()
    with session(model, 3000, num_blocks=800) as manager:
        name = manager.add_request(GIVEN[1], streaming=True)
        until(lambda: getattr(manager, "current_batch", 0) > 3, "a few tokens")
        with manager.pause():
            leave(model)
        (ended,) = take(manager, [name])
    assert ended.error.startswith("the model was unpatched, or switched to another attention, since this manager")
    assert 3 < len(ended.generated_tokens) < 3000
    unpatch_model(model)
    patch_model(model, config_for(model, "mixed", 5, 20))
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN), "a new one runs"


def test_a_kept_manager_of_a_model_that_runs_dense_now():
    model = patched()
    batched(model, GIVEN, persistent=True)
    model.set_attn_implementation("sdpa")
    ended = batched(model, GIVEN)
    assert "call model.destroy_cached_continuous_batching_manager() before" in ended[0].error
    model.destroy_cached_continuous_batching_manager()
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN), "Transformers' own, dense"


def test_a_request_after_the_end_of_a_session_is_refused():
    model = patched()
    with session(model) as manager:
        take(manager, manager.add_requests(GIVEN))
    assert manager.add_request(GIVEN[0]) is None
    assert manager.cache is None, "its memory is gone"
