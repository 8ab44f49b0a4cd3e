"""The maintainers' goals of ``hf-longctx bench``: for which sizes and kernels they are stated, and their verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import bench_goals
from helpers.bench_goals import Goal
from rich.console import Console

from hf_longctx.bench import show
from hf_longctx.bench.measure import Samples
from hf_longctx.bench.settings import Settings, default_layers

NAMES = {
    "decode": ["stock", "all retrieval", "half streaming"],
    "prefill": ["stock", "all retrieval", "all streaming", "blocks 10%", "blocks 20%", "blocks 30%"],
    "e2e": ["stock", "all retrieval", "half streaming", "all streaming"],
}
TIMES = {
    "decode": ("ms_per_layer", "sum_ms_per_layer"),
    "prefill": ("ms", "update_ms"),
    "e2e": ("prefill_ms", "decode_ms", "total_ms"),
}


def fake_results(benchmark: str, tokens: tuple[int, ...], kernel: str = "cpu") -> list[dict]:
    """Results of round figures: stock 100 ms, every next column half of it; choosing takes 2% of stock's time."""
    results = []
    for word in ("fp32", "bf16"):
        for count in tokens:
            made = {}
            for i, name in enumerate(NAMES[benchmark]):
                times = Samples([100 / 2**i]).as_dict()
                made[name] = dict.fromkeys(TIMES[benchmark], times)
                made[name] |= {f"{part}_ratio": 2.0**-i for part in ("prefill", "decode", "total")}
                made[name] |= {"kernel": kernel if i else "sdpa"}
                made[name] |= {"density": 0.1} if name.startswith("blocks") else {}
                made[name] |= {"share_of_sum": 0.2, "kept_bytes_per_layer": 10**6, "gb_per_s": 1.0, "sum_gb_per_s": 5.0}
            chosen = {"ms": Samples([2.0]).as_dict(), "share_of_stock": 0.02, "density": 0.5}
            patterns = dict.fromkeys(("vertical_slash", "block_topk", "vertical_slash:slash=10"), chosen)
            facts = {"heads": 1, "kv_heads": 1, "error": 0.0, "patterns": patterns}
            results.append({"dtype": word, "tokens": count, **facts, "columns": made})
    return results


def goals(benchmark: str, settings: Settings, results: list[dict]) -> list[Goal]:
    return bench_goals.goals(show.as_json(benchmark, settings, results))


@pytest.mark.parametrize(
    ("benchmark", "tokens", "kernel", "count"),
    [
        ("decode", (8192, 32768), "cpu", 8),
        ("decode", (8192, 32768), "native", 8),
        ("prefill", (8192, 32768), "cpu", 4 + 6 + 8),
        ("prefill", (8192, 32768), "native", 4 + 12 + 8),
        ("e2e", (512, 1024), "native", 12),
    ],
)
def test_goals_belong_to_the_default_sizes_and_to_two_kernels(benchmark, tokens, kernel, count):
    results = fake_results(benchmark, tokens, kernel)
    assert len(goals(benchmark, Settings(tokens), results)) == count
    other = goals(benchmark, Settings(tokens), fake_results(benchmark, tokens, "reference"))
    assert all("choosing" in goal.text for goal in other) and len(other) == (8 if benchmark == "prefill" else 0)
    for change in ({"heads": 64}, {"layers": 2}, {"recent": 128}, {"sink": 0}, {"head_dim": 128}, {"kv_heads": 16}):
        assert goals(benchmark, replace(Settings(tokens), **change), results) == []
    assert goals(benchmark, Settings((100,)), fake_results(benchmark, (100,))) == []


@pytest.mark.slow
def test_every_goal_says_reached_or_by_how_much_it_is_short(tmp_path):
    settings = Settings((8192, 32768))
    path = tmp_path / "out.json"
    path.write_text(json.dumps(show.as_json("decode", settings, fake_results("decode", settings.tokens))), "utf-8")
    done = subprocess.run([sys.executable, bench_goals.__file__, path], capture_output=True, text=True, check=True)
    printed = done.stdout
    assert (
        "decode fp32 at 32768, kernel cpu: all retrieval faster than stock: short by 1.00x: 2.00x (goal 3.00x)"
        in printed
    )
    assert (
        "decode fp32 at 32768, kernel cpu: half streaming faster than all retrieval: reached: 2.00x (goal 1.70x)"
        in printed
    )
    assert "share of the summing speed: short by 2.0%: 20.0% (goal 22.0%)" in printed
    assert "share of the summing speed: reached: 20.0% (goal 18.0%)" in printed
    native = goals("decode", settings, fake_results("decode", settings.tokens, "native"))
    assert [goal.goal for goal in native if "share" in goal.text] == [35.0] * 4
    assert len(goals("e2e", Settings((512, 1024)), fake_results("e2e", (512, 1024)))) == 12
    slower = Goal("", 105.0, 107.5, "% of stock's time", at_most=True)
    assert not slower.reached and slower.verdict().startswith("short by 2.5%: 107.5% of stock's time")
    assert not Goal("", 22.0, 474.0, "%").reached  # faster than the speed of reading


def test_a_busy_machine_is_said_and_no_goal_is_printed(capsys):
    settings = Settings((8192, 32768))
    data = show.as_json("decode", settings, fake_results("decode", settings.tokens), others=0.5)
    show.show(Console(width=250), data)
    printed = capsys.readouterr().out
    assert "Other processes took 50%" in printed and "goal" not in printed and "goals" not in data


@pytest.mark.quick
def test_the_goals_of_block_lists_are_shares_of_what_their_density_allows():
    shares = {"cpu": {"fp32": 65}, "native": {"fp32": 95, "bf16": 150}}
    for kernel, wanted in shares.items():
        results = fake_results("prefill", (8192,), kernel)
        made = {goal.text: goal for goal in goals("prefill", Settings((8192,)), results)}
        for word in ("fp32", "bf16"):
            texts = [
                f"prefill {word} at 8192, kernel {kernel}: blocks {n}% faster than stock's dense" for n in (10, 20, 30)
            ]
            found = [made[text] for text in texts if text in made]
            assert [goal.goal for goal in found] == [wanted[word]] * 3 if word in wanted else not found
            measured = [80, 160, 320][: len(found)]  # 8, 16 and 32 times faster at a density of 0.1
            assert [round(goal.measured) for goal in found] == measured
            assert [goal.reached for goal in found] == [share >= wanted[word] for share in measured]
    goal = Goal("", 65.0, 80.0, "% of 1/density")
    assert goal.verdict() == "reached: 80.0% of 1/density (goal 65.0% of 1/density)"


@pytest.mark.quick
def test_the_goals_of_choosing_are_stated_for_the_defaults_of_two_patterns():
    results = fake_results("prefill", (8192, 32768))
    made = {g.text: g for g in goals("prefill", Settings((8192, 32768)), results) if "choosing" in g.text}
    goal = {
        (8192, "vertical_slash"): 4.5,
        (32768, "vertical_slash"): 1.7,
        (8192, "block_topk"): 3,
        (32768, "block_topk"): 1.5,
    }
    assert {text: round(g.goal, 9) for text, g in made.items()} == {
        f"prefill {word} at {tokens}: choosing with {name}": share
        for word in ("fp32", "bf16")
        for (tokens, name), share in goal.items()
    }
    assert all(g.at_most and round(g.measured, 9) == 2 and g.reached == (g.goal >= 2) for g in made.values())


def test_the_goals_of_long_prompts_are_stated_for_eight_layers_and_a_fifth_of_the_blocks():
    factors = {"cpu": {"fp32": 1.6, "bf16": 2.4}, "native": {"fp32": 1.8, "bf16": 2.7}}
    for kernel, wanted in factors.items():
        results = fake_results("e2e", (32768,), kernel)
        for result in results:
            result["columns"]["half streaming + sparse 20%"] = {
                "kernel": kernel,
                "density": 0.198,
                "prefill_ratio": 0.5,
            }
            result["columns"]["half streaming + sparse 30%"] = {"kernel": kernel, "density": 0.3, "prefill_ratio": 0.1}
        made = goals("e2e", Settings((32768,), layers=8), results)
        assert [g.goal for g in made] == [wanted["fp32"], wanted["bf16"]] and [g.measured for g in made] == [2, 2]
        assert [g.reached for g in made] == [True, False]
        text = f"kernel {kernel}: half streaming + sparse 20% (read 19.8%), prompt to logits, faster than stock"
        assert all(g.text.endswith(text) for g in made)
        assert goals("e2e", Settings((32768,)), results) == []
    assert default_layers("e2e", (512, 32768)) == 8 and default_layers("e2e", (512, 1024)) == 4
    assert default_layers("prefill", (32768,)) == 4
