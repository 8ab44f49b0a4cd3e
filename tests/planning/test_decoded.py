"""A selection in what is planned: the bytes of its index are those really held, and what it reads is what is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.caches import read
from helpers.cases import cases, one_each
from helpers.tiny import config_for, tiny_config, tiny_model
from typer.testing import CliRunner

from hf_longctx import LongCtxCache, LongCtxConfig, patch_model, report
from hf_longctx.bench.memory_check import check
from hf_longctx.cache.break_even import Form
from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.commands._app import app
from hf_longctx.decode._growing import Growing, room
from hf_longctx.model.modules import state_of
from hf_longctx.planning.decoded import decoded
from hf_longctx.planning.find import find
from hf_longctx.planning.memory import DENSE, PATCHED, RESERVED, MemorySettings

CASES = {name: {"select": word, **fields} for name, (word, fields) in cases("decode").items()}
SMALL = {"budget": 64, "sink": 4, "recent": 16, "min_tokens": 256, "dense_layers": 1}
PAGES = {"select": "page_bounds", "page": 8, **SMALL}
TOKENS = 701
ROLES = ["RRSS", "RSSS", "RRRR"]


def patched(roles=ROLES, **select):
    model = tiny_model("llama", torch.float32)
    return patch_model(model, config_for(model, roles, decode={"retrieval": select}))


def after_one(model, tokens: int = TOKENS, **kwargs) -> LongCtxCache:
    """A cache of ``tokens`` tokens of which one was decoded."""
    cache = LongCtxCache(model, rollback=False, **kwargs)
    ids = torch.randint(3, 97, (1, tokens))
    read(model, cache, ids[:, :-1])
    read(model, cache, ids[:, -1:])
    return cache


def indexes(cache: LongCtxCache) -> list[int]:
    """Bytes of the indexes of every layer."""
    parts = [[part for one in layer.chosen for part in one.parts.values()] for layer in cache.own]
    return [sum(storage_bytes(part.index.tensors()) for part in layer) for layer in parts]


@pytest.mark.parametrize("case", one_each("decode"))
def test_the_index_of_every_selection_takes_what_is_counted(case):
    given = CASES[case] if CASES[case]["select"] == "dense" else {**SMALL, **CASES[case]}
    model = patched(**given)
    select = state_of(model).config.decode.retrieval
    counted = [heads * select.index_bytes(TOKENS, 8, 4) for heads in (2, 1, 4)]
    expected = [0] * select.dense_layers + counted[select.dense_layers :]
    cache = after_one(model)
    assert indexes(cache) == expected
    for _ in range(60):
        read(model, cache, torch.randint(3, 97, (1, 1)))
    last = 4 * select.index_bytes(TOKENS + 60, 8, 4)
    held = indexes(cache)[-1]
    assert held == last or (held < last and (select.refresh > 1 or select.queries)), (
        "so do those that grow, when a token chooses"
    )


def test_a_buffer_s_room_is_that_of_its_entries_however_it_grew():
    steps = [entries for entries in range(1, 2000) if room(entries) == entries]
    assert steps[:3] == [16, 32, 48] and all(16 <= b - a <= max(16, a // 8) for a, b in pairwise(steps))
    for parts in ([700], [1] * 700, [300, 400], [20, 600, 80]):
        grown = Growing()
        for at, part in enumerate(parts):
            grown.append(torch.zeros(1, 1, part, 1), sum(parts[at + 1 :]) * (parts == [20, 600, 80]))
            assert at or parts != [20, 600, 80] or grown.own.shape[2] == room(700), "what follows has room at once"
        assert grown.own.shape[2] == room(700) < 700 * 9 / 8 + 1
    grown = Growing()
    grown.append(torch.zeros(1, 1, 20, 1), most=500)
    assert grown.own.shape[2] == room(20, 500) == 500


@pytest.mark.parametrize("case", one_each("decode"))
def test_the_check_of_bench_memory_makes_the_index_of_every_selection(case, tmp_path):
    given = CASES[case] if CASES[case]["select"] == "dense" else {**SMALL, **CASES[case]}
    tiny_config("llama").save_pretrained(tmp_path / "model")
    select = state_of(model := patched(**given)).config.decode.retrieval
    state_of(model).config.to_yaml(tmp_path / "select.yaml")
    memory_model = find(str(tmp_path / "model"), MemorySettings(1, "fp32"), str(tmp_path / "select.yaml"))
    dense = replace(memory_model, config=memory_model.config.override(decode={"retrieval": {"select": "dense"}}))
    found = check(memory_model, RESERVED, TOKENS).most - check(dense, RESERVED, TOKENS).most
    assert found == (5 if select.dense_layers else 7) * select.index_bytes(TOKENS, 8, 4, TOKENS)


@pytest.mark.parametrize("way", [PATCHED, RESERVED])
def test_planned_bytes_are_those_of_a_cache_that_decoded(way, tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "model")
    found = {}
    for name, given in {"dense": {}, "pages": PAGES, "later": {**PAGES, "min_tokens": TOKENS + 1}}.items():
        model = patched(**given) if given else patched(select="dense")
        state_of(model).config.to_yaml(tmp_path / f"{name}.yaml")
        memory_model = find(str(tmp_path / "model"), MemorySettings(1, "fp32"), str(tmp_path / f"{name}.yaml"))
        found[name] = memory_model.kv(way, TOKENS)
        assert check(memory_model, way, TOKENS).most == found[name]
        assert memory_model.kv(DENSE, TOKENS) == 2 * 12 * TOKENS * 8 * 4
        if way == RESERVED:  # which takes what it will ever take; but for what is remembered for a rollback
            cache = LongCtxCache(model, TOKENS)
            ids = torch.randint(3, 97, (1, TOKENS))
            read(model, cache, ids[:, :-1])
            read(model, cache, ids[:, -1:])
            assert cache.nbytes == found[name]
    assert found["later"] == found["dense"], "too short to be selected from: no index is made"
    assert (TOKENS - SMALL["recent"]) // PAGES["page"] == 85
    assert found["pages"] - found["dense"] == (1 + 4) * 2 * (16 * 6 if way == PATCHED else TOKENS // 8) * 8 * 4


def test_the_break_even_and_the_config_count_it():
    plain, pages = patched(select="dense"), patched(**PAGES)
    held = Form.of(after_one(pages)).nbytes(TOKENS) - Form.of(after_one(plain)).nbytes(TOKENS)
    assert held == sum(indexes(after_one(pages))) > 0
    dense, kept = state_of(plain).config.kv_bytes(TOKENS, 4)
    assert state_of(pages).config.kv_bytes(TOKENS, 4) == (dense, kept + held)
    assert state_of(pages).config.kv_bytes(255, 4) == state_of(plain).config.kv_bytes(255, 4)
    given = ({"select": "dense"}, {**PAGES, "min_tokens": 0, "dense_layers": 0})
    plain, pages = (Form.of(after_one(patched(["RRRS"] * 3, **one))) for one in given)
    assert plain.saves_from < pages.saves_from < TOKENS
    assert not pages.saves(pages.saves_from - 1) and pages.saves(pages.saves_from)


def test_more_than_dense_says_that_there_is_an_index():
    for given, said in ((PAGES, True), ({"select": "dense"}, False)):
        model = patched(["RRRR"] * 3, **given)
        cache = after_one(model, 300)
        assert cache.nbytes > cache.nbytes_dense
        lines = str(report(model)).split("\n")
        assert max(map(len, lines)) <= 80
        assert any("room to grow, and an index" in line for line in lines) is said


@pytest.mark.parametrize("more", [{}, {"share": 0.25}, {"budget": 128, "page": 16}, {"budget": 10_000}])
def test_what_is_planned_to_be_read_is_read(more):
    model = patched(**{**PAGES, **more})
    found = decoded(state_of(model).plans, TOKENS)
    after_one(model)
    (tokens, reads), *_ = found.reads
    assert tokens == TOKENS and found.heads == 7 and found.dense == 2
    if more.get("budget") == 10_000:
        assert reads == TOKENS and report(model).read is None and found.share(*found.reads[0]) == 1
        assert f"a decoded token reads all of {TOKENS}, " in str(found)
    else:
        assert reads < TOKENS and report(model).read == pytest.approx(reads / TOKENS)
        assert found.share(tokens, reads) == pytest.approx((2 * tokens + 5 * reads) / (7 * tokens))
        assert f"reads {reads} of {TOKENS} tokens ({reads / TOKENS:.1%}), all of {TOKENS // 4}," in str(found)
    select = state_of(model).config.decode.retrieval
    assert select.runs(found.begins) and not select.runs(found.begins - 1)


def test_a_full_step_of_recycle_counts_in_the_mean():
    few = {**SMALL, "select": "recycle", "refresh": 10}
    model = patched(**few)
    (_, reads), *_ = decoded(state_of(model).plans, 700).reads
    cache = LongCtxCache(model, rollback=False)
    read(model, cache, torch.randint(3, 97, (1, 700)))
    for _ in range(10):  # the first of them is a full step, at position 700
        read(model, cache, torch.randint(3, 97, (1, 1)))
    assert report(model).read == pytest.approx(reads / 700, rel=0.05), "newer tokens are read as well"
    assert reads > 1.5 * (64 + 16 + 4)


def test_nothing_is_said_without_a_selection():
    assert decoded(state_of(patched(select="dense")).plans, TOKENS) is None
    never = decoded(state_of(patched(**{**PAGES, "share": 1.0})).plans, TOKENS)
    assert never.begins is None and "it never leaves one out" in str(never)
    whole = decoded(state_of(patched(**{**PAGES, "dense_layers": 0})).plans, TOKENS)
    assert "first layers" not in str(whole) and whole.dense == 0


def test_the_commands_say_it_in_80_columns(tmp_path):
    (tmp_path / "pages.yaml").write_text("extends: llama-3.1-8b-instruct\ndecode: {retrieval: {select: page_bounds}}\n")
    wide = {"COLUMNS": "80"}
    memory = ["bench", "memory", str(tmp_path / "pages.yaml"), "--memory", "24GB"]
    done = CliRunner().invoke(app, ["plan", *memory[2:], "--context", "128k"], env=wide)
    assert done.exit_code == 0 and max(map(len, done.output.splitlines())) <= 80, done.output
    said = "decode page_bounds: a decoded token reads 2368 of 131072 tokens (1.8%), 2368 of 32768 tokens (7.2%), "
    assert said in " ".join(done.output.split())
    done = CliRunner().invoke(app, memory, env=wide)
    assert done.exit_code == 0 and max(map(len, done.output.splitlines())) <= 80, done.output
    assert "decode.retrieval: page_bounds: a decoded token reads 2" in " ".join(done.output.split())
    memory[2] = "llama-3.1-8b-instruct"
    assert "decode.retrieval" not in CliRunner().invoke(app, memory, env=wide).output
    plan = LongCtxConfig.plan(str(tmp_path / "pages.yaml"), context=131072, memory="24GB")
    assert plan.as_dict()["decode"]["reads"][0]["reads"] == 2368
