"""Every number and every tensor of every store's file, forged: no forgery crashes the process or gives other answers.

Each is loaded and read in a forked child of its own, so that a crash is one case's and not the test's.
"""

from __future__ import annotations

import copy
import os
import signal
import traceback
from pathlib import Path

import pytest
import torch
from forgeries import Forger
from store_cases import CASES, case_config, role_of
from tiny import left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model

pytestmark = pytest.mark.slow

REFUSED, EQUAL, OTHER, RAISED = 0, 1, 2, 3  # how a child ends
PATIENCE = 20  # seconds of a child
# What only tells where the text of a row begins or ends, how far back one may go, and with how much room: another
# number makes the file of another cache, which is as true as that of this one.
CONTENT = ("starts", "ends", "'oldest'", "'begin'", "'low'", "'base'", "'whole'", "'capacity'", "'slots'", "max_tokens")


def models(case):
    """The same model with the native kernel and with the one that auto takes."""
    model = tiny_model("llama", torch.float32, layers=2, head_dim=32, kv_heads=4)
    twin = copy.deepcopy(model)
    return [
        patch_model(one, {**case_config(one, case).to_dict(), "kernel": kernel})
        for one, kernel in ((model, "native"), (twin, "auto"))
    ]


def plain(model):
    ids, mask = left_padded([150])
    return LongCtxCache(model), ids, mask


def padded(model):
    ids, mask = left_padded([150, 110, 150])
    return LongCtxCache(model, 400), ids, mask


def forked(model):
    """Rows that share a prompt, went on by themselves, and were put into another order."""
    cache, ids, mask = plain(model)
    fill(model, cache, ids, mask)
    cache = cache.fork()
    cache.batch_repeat_interleave(3)
    ids, mask = torch.randint(3, 97, (3, 40)), torch.ones(3, 190, dtype=torch.long)
    fill(model, cache, ids, mask)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    return cache, ids[:, :0], mask


def fill(model, cache, ids, mask):
    with torch.no_grad():
        if ids.shape[1]:
            model(ids, attention_mask=mask, past_key_values=cache)


def answers(model, cache, mask):
    """Logits of three tokens, a chunk, and two more after a part of it was taken back."""
    told, found = torch.Generator().manual_seed(5), []

    def step(count):
        nonlocal mask
        mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
        ids = torch.randint(3, 97, (len(mask), count), generator=told)
        found.append(model(ids, attention_mask=mask, past_key_values=cache).logits)

    with torch.no_grad():
        for count in (1, 1, 1, 7):
            step(count)
        cache.crop(-3)
        mask = mask[:, :-3]
        step(1)
    return found


def outcome(path, both, wanted, mask) -> int:
    for model, want in zip(both, wanted, strict=True):
        try:
            got = answers(model, LongCtxCache.load(path, model), mask)
        except CacheError:
            return REFUSED
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            return OTHER
    return EQUAL


def in_a_child(path, *given) -> int:
    """How a child ended that loads the file: an outcome, or less than 0 for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        signal.alarm(PATIENCE)
        ended = outcome(path, *given)
    except BaseException:  # noqa: BLE001 what a child raised is the finding
        (path.parent / "raised").write_text(traceback.format_exc())
        ended = RAISED
    os._exit(ended)


@pytest.mark.parametrize("fillers", [plain, padded, forked])
@pytest.mark.parametrize("case", CASES)
def test_no_forgery_crashes_or_gives_other_answers(case, fillers, tmp_path):
    assert role_of(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a library's threads hold is not there after a fork
    try:
        both = models(case)
        cache, ids, mask = fillers(both[0])
        fill(both[0], cache, ids, mask)
        cache.save(true := tmp_path / "true")
        wanted = [answers(model, LongCtxCache.load(true, model), mask) for model in both]
        check(Forger(true), tmp_path / "false", both, wanted, mask)
    finally:
        torch.set_num_threads(threads)


def check(forger: Forger, path: Path, *given) -> None:
    ends: dict[int, list[str]] = {}
    assert in_a_child(forger.write(path, lambda tensors, told: None), *given) == EQUAL, "a control: the true file"
    for what, edit in forger.every():
        ended = in_a_child(forger.write(path, edit), *given)
        ends.setdefault(ended, []).append(what)
        assert ended in (REFUSED, EQUAL) or (ended == OTHER and any(word in what for word in CONTENT)), (
            what,
            ended,
            (path.parent / "raised").read_text() if ended == RAISED else "",
        )
    assert len(ends[REFUSED]) > 0.9 * sum(map(len, ends.values())) > 500
