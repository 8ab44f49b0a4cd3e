"""``hf-longctx configs``: every config is listed whole, and the map that is drawn is the map that is run."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_longctx.commands._app import app
from hf_longctx.commands.configs import SHADES, _shades
from hf_longctx.config import ranking
from hf_longctx.config.config import load_shipped as read_shipped
from hf_longctx.config.files import shipped
from hf_longctx.config.ranking import published_table
from hf_longctx.config.reference import FOLDERS, _section, meanings, reference
from hf_longctx.config.words import words
from hf_longctx.model.family import families
from hf_longctx.model.models_page import LEFT_OUT

ROOT = Path(__file__).parents[2]
SHOWN = ("llama-3.1-8b-instruct", "llama-3.1-70b-instruct", "llama-2-7b-32k-instruct")  # 8B, 70B, no groups


load_shipped = functools.cache(read_shipped)


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Every shipped config is read once for all tests."""
    monkeypatch.setattr(ranking, "load_shipped", load_shipped)


def invoke(*args: str, width: int = 80):
    return CliRunner().invoke(app, ["configs", *args], env={"COLUMNS": str(width), "TERM": "dumb"})


def drawn(output: str) -> tuple[str, ...]:
    """The roles of the head map: one text per layer."""
    lines = output[output.index("layer, one mark per KV head") :].splitlines()[1:]
    found = []
    for layer, line in enumerate(filter(None, lines)):
        number, *marks, count = line.split()
        row = "".join(marks).replace(".", "S")
        assert (int(number), int(count)) == (layer, row.count("R"))
        found.append(row)
    return tuple(found)


@pytest.mark.parametrize("width", [80, 100])
def test_every_config_is_listed_whole(width):
    done = invoke(width=width)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= width
    assert "…" not in done.output
    words = done.output.replace(",", "").split()
    for name in shipped():
        config = load_shipped(name)
        assert {name, config.model.ids[0]} <= set(words), name
        (dense, kept), (more, more_kept) = (config.kv_bytes(tokens) for tokens in (32768, 131072))
        for numbers in ((dense, kept), (more, more_kept)):
            assert " -> ".join(f"{n / 1e6:5.0f}" for n in numbers) in done.output, name
    unmeasured = [name for name in shipped() if load_shipped(name).heads.confidence == "none"]
    assert done.output.count("heads not measured: run identify") == len(unmeasured) > 0
    low = [name for name in shipped() if load_shipped(name).heads.confidence == "low"]
    assert done.output.count("(low confidence)") == len(low) > 0
    assert "4295 ->  2168" in done.output and "17180 ->  8611" in done.output and "50.0%" in done.output


# Not measured, with and without an alternative; measured badly; measured.
@pytest.mark.parametrize("name", ["qwen3-8b", "qwen2-7b-instruct", "llama-2-7b-hf", "tiny-llama"])
def test_show_says_how_to_measure_what_nobody_measured(name):
    config, said = load_shipped(name), " ".join(invoke("show", name).output.split())
    command = f"hf-longctx identify {config.model.ids[0]} --out my.yaml To give the map away: --share my.json --licence"
    assert (command in said) == (config.heads.confidence == "none")
    if config.heads.confidence == "none" and config.heads.alternatives:
        used = invoke("show", name, "--use", next(iter(config.heads.alternatives)), "--retrieval-fraction", "0")
        assert used.exit_code == 0 and "hf-longctx identify" not in used.output


def test_the_best_are_listed_first():
    listed = [line.split()[0] for line in invoke(width=100).output.splitlines() if line.split()[:1]]
    listed = [name for name in listed if name in shipped()]
    assert sorted(listed) == sorted(shipped())

    def rank(name: str) -> tuple:
        config = load_shipped(name)
        dense, kept = config.kv_bytes(131072)
        own = config.model.ids[0].startswith("hf-longctx/")
        return own, ("measured", "low", "none").index(config.heads.confidence), round(kept / dense, 3), name

    assert listed == sorted(shipped(), key=rank) and listed[0] == "llama-2-7b-32k-instruct"
    assert listed[-3:] == ["tiny-llama", "tiny-mistral", "tiny-qwen3"], "the embedded ones last"
    assert invoke("table").output == published_table()
    assert invoke("table", "--best", "10").output == published_table(10)
    assert invoke("table", "--best", "0").exit_code == 2


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", SHOWN)
def test_show_draws_the_roles(name, width):
    done, config = invoke("show", name, width=width), load_shipped(name)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= width
    assert drawn(done.output) == config.roles()
    for word in (*config.model.ids, *config.heads.alternatives, *config.prefill.tables, "R retrieval", ". streaming"):
        assert word in done.output, word
    for table in config.prefill.tables.values():
        for index, budget in enumerate(table.budgets):
            count = sum(row.count(index) for row in table.map)
            said = f"{count} query heads: vertical_slash  vertical {budget.vertical}, slash {budget.slash}"
            assert said in done.output


def test_show_draws_another_map():
    name, config = "llama-3.1-8b-instruct", load_shipped("llama-3.1-8b-instruct")
    half = drawn(invoke("show", name, "--use", "kvzip.retrieval_score").output)
    assert half == config.override(heads={"use": "kvzip.retrieval_score"}).roles() != config.roles()
    few = drawn(invoke("show", name, "--use", "kvzip.retrieval_score", "--fraction", "0.1").output)
    assert "".join(few).count("R") == 26
    assert "".join(drawn(invoke("show", name, "--fraction", "0").output)).count("R") == 0


def test_wrong_names_are_one_line_with_the_nearest():
    for args, said in (
        (("llama-3.1-8b-instrct",), "Did you mean 'llama-3.1-8b-instruct'?"),
        (("llama-3.1-8b-instruct", "--use", "kvzip"), "heads.use: got 'kvzip'"),
        (("llama-3.1-8b-instruct", "--fraction", "2"), "heads.retrieval_fraction: got 2.0"),
        (("llama-3.1-70b-instruct", "--fraction", "0.5"), "over roles"),
        (("llama-3.1-70b-instruct", "--use", "qrhead.retrieval_set"), "largest usable retrieval_fraction"),
    ):
        done = invoke("show", *args)
        assert done.exit_code == 2 and said in done.output.replace("\n", " "), done.output


def test_colours_follow_the_rank():
    assert _shades(((0.9, 0.1), (0.5, 0.2)), (0, 1)) == [[SHADES[0], SHADES[3]], [SHADES[1], SHADES[2]]]
    assert _shades(((0.0, 0.0), (0.0, 0.0)), (0, 1)) == [[SHADES[0]] * 2] * 2
    assert _shades(((9.0, 8.0), (0.5, 0.2)), (1,)) == [[""] * 2, [SHADES[0], SHADES[2]]]


def test_the_reference_is_in_step_with_the_code():
    done = invoke("reference")
    assert done.exit_code == 0, done.output
    written = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert written == done.output, "run: hf-longctx configs reference > docs/reference.md"


def test_the_page_of_models_is_in_step_with_the_records():
    done = invoke("models")
    assert done.exit_code == 0, done.output
    assert (ROOT / "docs" / "models.md").read_text("utf-8") == done.output, (
        "run: hf-longctx configs models > docs/models.md"
    )
    left_out = [name for names in LEFT_OUT.values() for name in names.split()]
    assert len(set(left_out)) == len(left_out)
    assert not set(left_out) & set(families())
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"It knows {len(families())} [model types](docs/models.md)" in readme


def test_the_reference_says_something_of_every_key():
    text, silent = reference(), [line for line in reference().splitlines() if re.search(r"\|\s*\|$", line)]
    assert not silent
    keys = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert {"retrieval_fraction", "kv_budget", "sink", "recent", "vertical", "map", "cpu", "stock"} <= keys
    titles = re.findall(r"^## `(\w+: \w+)`", text, re.MULTILINE)
    wanted = [f"{key}: {word}" for folder, key in FOLDERS.items() for word in words(folder)]
    assert sorted(titles) == sorted(wanted)
    assert len(titles) >= 9


def test_a_key_without_a_meaning_fails_the_reference():
    @dataclass(frozen=True)
    class Silent:
        """A spec.

        Attributes:
            known: what it is,
                in two lines.
        """

        known: int = 1
        unknown: int = 2

    assert meanings(Silent) == {"known": "what it is, in two lines."}
    with pytest.raises(KeyError, match="unknown"):
        _section("Silent", Silent)
