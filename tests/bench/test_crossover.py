"""``hf-longctx bench crossover``: its arithmetic on made-up times, what it measures, and what it tells the user."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.kernel_faults import change_attend
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxConfig, LongCtxError, UnsupportedModeError
from hf_longctx.bench import block_lists, crossover
from hf_longctx.bench.settings import Settings
from hf_longctx.commands._app import app
from hf_longctx.config.config import load_shipped
from hf_longctx.kernels import cpu
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import Causal

SHAPE = {"heads": 8, "kv_heads": 4, "head_dim": 16}
TINY = Settings((256, 512), dtypes=("fp32",), rounds=2, **SHAPE)
FLAGS = [part for name, value in SHAPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
PATTERN = "block_topk:top_k=1"
TABLE = {
    "budgets": [{"pattern": "dense"}, {"pattern": "block_topk", "top_k": 1}, {"pattern": "block_topk", "top_k": 2}],
    "map": [[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 0]],
}
CONFIG = {
    "model": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "heads": {"roles": ["SR", "RS", "RR"]},
    "prefill": {"retrieval": {"table": "mine"}, "tables": {"mine": TABLE}, "share_groups": True, "min_tokens": 9999},
    "kernel": "cpu",
}


def test_gain_is_the_middle_and_the_worst_round():
    assert crossover.gain([10, 20, 90], [10, 10, 30]) == (2, 1)
    assert crossover.gain([4], [8]) == (0.5, 0.5)
    # a machine that slows down by half does so for both columns of a round
    assert crossover.gain([10, 20, 10, 20], [5, 10, 5, 10]) == (2, 2)
    many = [float(n) for n in range(1, 21)]
    assert crossover.gain(many, [1.0] * 20) == (10.5, 3)  # the worst tenth, two rounds, is left out


def test_the_crossover_is_the_shortest_length_from_which_every_longer_one_wins():
    assert crossover.first_win([(512, False), (1024, False), (2048, True), (4096, True)]) == 2048
    assert crossover.first_win([(512, True), (1024, False), (2048, True)]) == 2048  # 512 was luck
    assert crossover.first_win([(4096, True), (512, True), (1024, True)]) == 512
    assert crossover.first_win([(512, True), (1024, True), (2048, False)]) is None
    assert crossover.first_win([(512, False)]) is None and crossover.first_win([]) is None


def made_up(wins: dict[int, float], word: str = "fp32") -> list[dict]:
    return [
        {"dtype": word, "tokens": tokens, "faster_in_worst": worst, "wins": worst > 1} for tokens, worst in wins.items()
    ]


def test_it_is_clear_after_two_wins_the_second_of_them_large():
    assert crossover.is_clear(made_up({512: 1.1, 1024: 1.5}))
    assert not crossover.is_clear(made_up({512: 1.0, 1024: 9.0}))  # the shorter one did not win
    assert not crossover.is_clear(made_up({512: 1.4, 1024: 1.4}))
    assert not crossover.is_clear(made_up({512: 9.0}))


def test_measuring_stops_when_it_is_clear_and_starts_with_the_shortest(monkeypatch):
    worst = {256: 0.5, 512: 1.2, 1024: 1.4, 2048: 1.6, 4096: 3.0}
    monkeypatch.setattr(
        crossover, "_measured", lambda case, word, tokens, told: made_up({tokens: worst[tokens]}, word)[0]
    )
    settings = Settings((4096, 512, 256, 2048, 1024, 256), **SHAPE)
    case = crossover.case_of(settings)
    results = crossover.run(case)
    assert [(r["dtype"], r["tokens"]) for r in results] == [
        (word, tokens) for word in ("fp32", "bf16") for tokens in (256, 512, 1024, 2048)
    ]
    some = [r for r in results if r["dtype"] == "fp32" or r["tokens"] == 256]
    found = crossover.facts(case, some)["crossover"]
    assert found["fp32"]["min_tokens"] == 512 and (found["fp32"]["shortest"], found["fp32"]["longest"]) == (256, 2048)
    assert found["bf16"] == {"min_tokens": None, "shortest": 256, "longest": 256}


def test_the_override_is_one_that_the_library_takes():
    one = crossover.case_of(TINY, pattern=PATTERN, kernel="reference")
    made = crossover.override(one, 2048)
    assert made["python"] == (
        "patch_model(model, kernel='reference', "
        "prefill={'min_tokens': 2048, 'retrieval': {'pattern': 'block_topk', 'top_k': 1}})"
    )
    found = load_shipped("tiny-llama").override(**yaml.safe_load(made["yaml"]))
    assert (found.kernel, found.prefill.min_tokens, found.prefill.retrieval.top_k) == ("reference", 2048, 1)
    assert eval(made["python"], {"patch_model": lambda model, **over: over, "model": None}) == yaml.safe_load(
        made["yaml"]
    )


def test_without_a_config_half_of_the_kv_heads_are_measured_with_a_default_pattern():
    one = crossover.case_of(TINY)
    assert (one.settings.heads, one.settings.kv_heads, one.settings.layers) == (4, 2, 1)
    assert one.prefill == {"min_tokens": 0, "retrieval": {"pattern": "vertical_slash"}} and one.config is None
    assert crossover.override(one, 512)["python"].endswith("'retrieval': {'pattern': 'vertical_slash'}})")
    assert "kernel" not in crossover.case_of(TINY, kernel="auto").given


def test_a_config_gives_shape_roles_patterns_and_kernel(tmp_path):
    path = tmp_path / "mine.yaml"
    LongCtxConfig.from_dict(CONFIG).to_yaml(path)
    one = crossover.case_of(TINY, config=str(path))
    settings = one.settings
    assert (settings.heads, settings.kv_heads, settings.head_dim, settings.kernel) == (
        2,
        1,
        32,
        "cpu",
    )  # 4 R / 3 layers
    assert one.prefill["share_groups"] is True and one.prefill["min_tokens"] == 0 and one.given == {}
    retrieval = {(0, 1): [1, 1], (1, 0): [2, 2], (2, 0): [0, 1], (2, 1): [2, 0]}
    rows = {
        tuple(crossover._drawn(LongCtxConfig.from_dict(CONFIG), s, "x")[1]["tables"]["mine"]["map"][0])
        for s in range(40)
    }
    assert rows == {tuple(row) for row in retrieval.values()}
    assert crossover.override(one, 4096) == {
        "python": f"patch_model(model, {str(path)!r}, prefill={{'min_tokens': 4096}})",
        "yaml": "prefill: {min_tokens: 4096}\n",
    }
    results = crossover.run(one)
    assert [r["tokens"] for r in results] == [256, 512] and results[0]["columns"]["sparse"]["kernel"] == "cpu"
    other = crossover.case_of(TINY, config=str(path), pattern=PATTERN, kernel="reference")
    assert other.settings.kernel == "reference" and other.prefill["retrieval"]["top_k"] == 1
    assert other.prefill["tables"] == {} and set(other.given) == {"kernel", "prefill"}
    assert crossover.case_of(TINY, config=str(path), kernel="cpu").given == {}


def test_a_shipped_config_and_one_of_its_tables():
    one = crossover.case_of(TINY, config="llama-3.1-8b-instruct", table="minference")
    assert one.settings.head_dim == 128 and one.given == {"prefill": {"retrieval": {"table": "minference"}}}
    (row,) = one.prefill["tables"]["minference"]["map"]
    assert len(row) == one.settings.heads == 4 * one.settings.kv_heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "tiny-llama"}, "tiny-llama: its retrieval heads read densely; give a pattern or a table"),
        ({"config": "no-such"}, "got 'no-such'"),
        ({"config": "/no/such.yaml"}, "cannot be read"),
        ({"config": "tiny-llama", "table": "mine"}, "prefill.retrieval.table: got 'mine'"),
        ({"table": "mine"}, "a table is a part of a config"),
        ({"config": "tiny-llama", "table": "mine", "pattern": PATTERN}, "not both"),
        ({"pattern": "dense"}, "expected a pattern that chooses"),
        ({"pattern": "vertikal"}, "got 'vertikal', expected one of"),
        ({"kernel": "cppu"}, "kernel: got 'cppu'"),
        ({"config": "tiny-llama", "pattern": PATTERN, "kernel": "cppu"}, "kernel: got 'cppu'"),
    ],
)
def test_what_cannot_be_measured_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        crossover.case_of(TINY, **arguments)


def test_short_prompts_streaming_heads_and_kernels_for_other_machines_are_errors():
    with pytest.raises(ConfigError, match="at least 128 tokens, given 100"):
        crossover.case_of(Settings((100, 512), **SHAPE))
    with pytest.raises(ConfigError, match="every KV head is streaming"):
        crossover._drawn(LongCtxConfig.from_dict({**CONFIG, "heads": {"roles": ["SS"] * 3}}), 0, "x")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedModeError, match="triton"):
            crossover.run(crossover.case_of(TINY, pattern=PATTERN, kernel="triton"))


def test_results_hold_both_columns_their_kernels_and_the_density():
    settings = Settings((256, 512), rounds=3, **SHAPE)
    results = crossover.run(crossover.case_of(settings, pattern=PATTERN, kernel="cpu"))
    assert [(r["dtype"], r["tokens"]) for r in results] == [(d, t) for d in ("fp32", "bf16") for t in (256, 512)]
    for result in results:
        assert list(result["columns"]) == ["dense", "sparse"]
        raw = {name: column["ms"]["raw_ms"] for name, column in result["columns"].items()}
        assert all(len(times) == 3 and min(times) > 0 for times in raw.values())
        assert (result["faster"], result["faster_in_worst"]) == crossover.gain(raw["dense"], raw["sparse"])
        assert result["wins"] == (result["faster_in_worst"] > 1)
        assert {column["kernel"] for column in result["columns"].values()} == {"cpu"}
        blocks = result["tokens"] // 64
        least, causal = 2 * blocks - 1, blocks * (blocks + 1) / 2
        assert least / causal <= result["columns"]["sparse"]["density"] < 1
        assert "density" not in result["columns"]["dense"]


@pytest.mark.parametrize(
    ("reads_class", "message"),
    [(BlockList, "kernel cpu for block lists differs"), (Causal, "the dense output")],
)
def test_a_wrong_kernel_is_caught_before_anything_is_timed(reads_class, message, monkeypatch):
    other = block_lists.random_list(256, 4, 0.9, seed=5)

    def wrong(q, segments, reads):
        if reads_class is BlockList:
            return q, segments, other if reads.kv_len == 256 else reads
        return q, [replace(segment, v=segment.v.flip(2)) for segment in segments], reads

    change_attend(monkeypatch, cpu, reads_class, wrong)
    monkeypatch.setattr(crossover, "turns", lambda *args: pytest.fail("timed columns that differ"))
    with pytest.raises(LongCtxError, match=message):
        crossover.run(crossover.case_of(TINY, pattern=PATTERN, kernel="cpu"))


def test_a_pattern_that_does_not_run_as_it_chooses_is_caught(monkeypatch):
    monkeypatch.setattr(crossover, "turns", lambda *args: pytest.fail("timed columns that differ"))
    select = crossover.select
    monkeypatch.setattr(crossover, "select", lambda heads, q, k, scale: select(heads, -q, k, scale))
    with pytest.raises(LongCtxError, match="the sparse output differs"):
        crossover.run(crossover.case_of(replace(TINY, tokens=(1024,)), pattern="block_topk:top_k=3", kernel="cpu"))


def test_the_command_prints_the_override_or_that_there_is_none(tmp_path, monkeypatch):
    for win in (True, False):
        monkeypatch.setattr(crossover, "gain", lambda dense, sparse: (2.0, 1.2) if win else (2.0, 1.0))  # noqa: B023
        path = tmp_path / f"{win}.json"
        command = ["bench", "crossover", *FLAGS, "--tokens", "512,256", "--pattern", PATTERN, "--rounds", "2"]
        done = CliRunner().invoke(app, [*command, "--threads", "1", "--json", str(path)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        data = json.loads(path.read_text())
        assert list(data) == ["benchmark", "environment", "settings", "results", "subject", "crossover"]
        assert data["subject"]["prefill"]["retrieval"] == {"pattern": "block_topk", "top_k": 1}
        said = data["crossover"]["fp32"]
        if win:
            assert said["min_tokens"] == 256 and "wins from 256 tokens on (measured: 256 to 512)" in done.output
            assert said["python"] in done.output and "          min_tokens: 256" in done.output
        else:
            assert said["min_tokens"] is None and "did not win at the longest of the lengths" in done.output
            assert "patch_model" not in done.output


@pytest.mark.parametrize("option", ["--heads", "--kv-heads", "--head-dim"])
def test_a_shape_beside_a_config_is_refused(option):
    done = CliRunner().invoke(app, ["bench", "crossover", "--config", "tiny-llama", "--pattern", PATTERN, option, "8"])
    assert done.exit_code == 2 and option in done.stderr and "the shape is the config's" in done.stderr
