"""Every number and every tensor of every store's file, forged: no forgery crashes the process or gives other answers.

They are loaded and read in forked children: where one crashes, the next goes on after the case that did it.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import traceback
from pathlib import Path

import pytest
import torch
from helpers.forgeries import Edit, Forger
from helpers.store_cases import BY_DATA, CASES, case_config
from helpers.tiny import left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model

pytestmark = pytest.mark.slow

REFUSED, EQUAL, OTHER, RAISED = 0, 1, 2, 3  # how a child ends
PATIENCE = 20  # seconds of a child
# What only tells where the text of a row begins or ends, how far back one may go, and with how much room: another
# number makes the file of another cache, which is as true as that of this one.
CONTENT = (
    r"starts|ends|'(oldest|begin|low|base|whole|capacity|slots)'|max_tokens"
    r"|'(prompt_end|reading|judged|scale|softcap|processed|gathered)'"  # where a prompt ends, and by what it is scored
)
CHOSEN_ROWS = r"'numbers'(, '\d+')?\) ="  # which row of a page is read as which, where pages are shared


def models(case):
    """The same model with the native kernel and with the one that auto takes."""
    model = tiny_model("llama", torch.float32, layers=2, head_dim=32, kv_heads=4)
    twin, fields = copy.deepcopy(model), {"page": 48} if "page" in CASES[case] else {}
    return [
        patch_model(one, case_config(one, case, **fields), kernel=kernel)
        for one, kernel in ((model, "native"), (twin, "auto"))
    ]


def padded(model):
    ids, mask = left_padded([150, 110, 150])
    return LongCtxCache(model, 400), ids, mask


def forked(model):
    """Rows that share a prompt, went on by themselves, and were put into another order."""
    cache, ids, mask = LongCtxCache(model), *left_padded([150])
    fill(model, cache, ids, mask)
    cache = cache.fork()
    cache.batch_repeat_interleave(3)
    ids, mask = torch.randint(3, 97, (3, 40)), torch.ones(3, 190, dtype=torch.long)
    fill(model, cache, ids, mask)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    return cache, ids[:, :0], mask


def decoded(model):
    """Sequences whose prompt has ended."""
    cache, ids, mask = padded(model)
    fill(model, cache, ids, mask)
    mask = torch.cat([mask, mask[:, -1:]], 1)
    fill(model, cache, ids[:, :1], mask)
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


def child(first: int, forger: Forger, edits: list[Edit], path: Path, *given) -> int:
    """What a process loads and reads that begins with an edit: (number, how it ended) as text, through a pipe."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        return read
    for number in range(first, len(edits)):
        try:
            signal.alarm(PATIENCE)
            ended = outcome(forger.write(path, edits[number]), *given)
        except BaseException:  # noqa: BLE001 what a child raised is the finding
            (path.parent / "raised").write_text(traceback.format_exc())
            ended = RAISED
        os.write(write, f"{number} {ended}\n".encode())
        if ended == RAISED:
            break
    os._exit(0)


def ends_of(forger: Forger, edits: list[Edit], path: Path, *given) -> list[int]:
    """How each edit's file ended: an outcome, or less than 0 for a signal."""
    found: list[int] = []
    while len(found) < len(edits):
        with os.fdopen(child(len(found), forger, edits, path, *given)) as lines:
            for line in lines:
                number, ended = map(int, line.split())
                assert number == len(found)
                found.append(ended)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        if status:
            found.append(status)
        if found[-1] not in (REFUSED, EQUAL, OTHER):
            break  # one such is enough to fail
    return found


FILLED = [(case, how) for case in CASES for how in (padded, forked, *([decoded] if case in BY_DATA else []))]


@pytest.mark.parametrize(("case", "fillers"), FILLED)
def test_no_forgery_crashes_or_gives_other_answers(case, fillers, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a library's threads hold is not there after a fork
    try:
        both = models(case)
        cache, ids, mask = fillers(both[0])
        fill(both[0], cache, ids, mask)
        cache.save(true := tmp_path / "true")
        wanted = [answers(model, LongCtxCache.load(true, model), mask) for model in both]
        content = f"{CONTENT}|{CHOSEN_ROWS}" if "page" in CASES[case] else CONTENT
        check(content, Forger(true), tmp_path / "false", both, wanted, mask)
    finally:
        torch.set_num_threads(threads)


def check(content: str, forger: Forger, path: Path, *given) -> None:
    later = ("('kept', 1", "layers.1.")  # what every layer checks alike is tried here and there in the second one
    cases = [case for at, case in enumerate(forger.every()) if at % 7 == 0 or not case[0].startswith(later)]
    cases = [("the true file", lambda tensors, told: None), *cases]
    ends = ends_of(forger, [edit for _, edit in cases], path, *given)
    wrong = [
        (what, ended)
        for (what, _), ended in zip(cases, ends, strict=False)
        if ended not in (REFUSED, EQUAL) and not (ended == OTHER and re.search(content, what))
    ]
    raised = path.parent / "raised"
    assert not wrong, f"{wrong[:20]}: {raised.read_text() if raised.exists() else ''}"
    assert ends[0] == EQUAL, "a control"
    assert ends.count(REFUSED) > 0.9 * len(cases) > 500
