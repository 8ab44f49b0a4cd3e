"""The commands as a person meets them: help that hides nothing, tables of whole words, mistakes in one line."""

from __future__ import annotations

import io
import re

import pytest
import typer
from rich.console import Console
from rich.text import Text
from transformers.utils import logging
from typer.testing import CliRunner

from hf_longctx.assets import asset
from hf_longctx.commands._options import load_model, no_bars
from hf_longctx.commands.app import app
from hf_longctx.io.console import _wrapped, tables

NAMES = ["", "kernel", "ms per layer", "vs all retrieval", "read at GB/s", "of sum"]
ROWS = [["[bold]fp32[/]"], ["half streaming", "native", "3.81 (1.84 - 6.44)", "1.00x", "4.26", "5%"], None, ["stock"]]


def commands(group, path=()):
    """(words, command) of every command, groups left out."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


EVERY = dict(commands(typer.main.get_command(app)))


def invoke(*args: str, width: int = 200):
    return CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": str(width), "TERM": "dumb"})


def options(words) -> dict[str, str]:
    return {name: option.help for option in EVERY[words].params for name in option.opts if name.startswith("--")}


def printed(width: int) -> list[list[str]]:
    """The lines of every table."""
    found = []
    for table in tables("a title", NAMES, ROWS, width):
        to = Console(width=max(width, 200), file=io.StringIO())
        to.print(table)
        found.append(to.file.getvalue().splitlines())
    return found


def test_the_commands_are_counted():
    assert len(EVERY) == 16
    assert sum(len(command.params) for command in EVERY.values()) > 100


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_shows_all_that_is_written(words):
    for param in EVERY[words].params:
        said = getattr(param, "help", None) or ""
        assert Text.from_markup(said).plain == said, f"{param.name}: [...] is taken for markup and not shown"
    assert Text.from_markup("layers [default: all]").plain != "layers [default: all]", "a control"


def test_help_shows_defaults_in_words():
    assert "[default: (beside --out)]" in invoke("identify", "--help").stdout
    assert "[default: (4, or 8 with a prompt of 32768 tokens or more)]" in invoke("bench", "e2e", "--help").stdout


def test_one_thing_has_one_name_and_one_wording():
    of_models = [("identify",), ("identify-prefill",), ("compare",), ("eval",)]
    for option, count in {"--dtype": 4, "--device": 4}.items():
        told = [options(words)[option] for words in of_models if option in options(words)]
        assert len(told) == count and len(set(told)) == 1, told
    assert options(("compare",))["--config"] == options(("eval",))["--config"]
    for words in (("compare",), ("eval",), ("bench", "memory")):
        assert "--prefill-chunk-size" in options(words)
    for words in (("identify",), ("configs", "show")):
        assert "--retrieval-fraction" in options(words)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--device", "cuda:99"), "--device: cuda:99 cannot be used here: "),
        (("--device", "gpu"), "--device: got 'gpu', expected cpu, cuda, cuda:1 or the like."),
        ((), "MODEL: "),
    ],
)
def test_a_model_or_device_that_cannot_be_used_is_one_line(args, message, tmp_path):
    done = invoke("identify", tmp_path, "--out", tmp_path / "my.yaml", *args)
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr.startswith(f"ConfigError: {message}") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [50, 60, 80, 100])
def test_a_table_is_no_wider_than_it_may_be_and_breaks_no_word(width):
    parts = printed(width)
    lines = [line for part in parts for line in part]
    assert max(map(len, lines)) <= width
    text = " ".join(lines).split()
    for word in " ".join([*NAMES, "fp32", "half streaming", "3.81 (1.84 - 6.44)", "4.26", "5%"]).split():
        assert word in text, word
    assert all(sum("half streaming" in line for line in part) == 1 for part in parts), "every part names its rows"
    assert " ".join(lines).count("a title") == 1


def test_a_table_is_split_only_where_it_must_be():
    assert [_wrapped("KV cache MB", 4, n).split("\n") for n in (1, 2, 3)] == [
        ["KV cache MB"],
        ["KV cache", "MB"],
        ["KV", "cache", "MB"],
    ]
    assert [len(printed(width)) for width in (50, 80, 200)] == [2, 1, 1]
    assert any("vs all retrieval" in line for line in printed(200)[0])
    assert not any("vs all retrieval" in line for line in printed(80)[0])


def test_an_embedded_model_loads_without_bars(capfd):
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        load_model(str(asset("tiny-llama")), "auto", "cpu")
        assert "Loading weights" not in capfd.readouterr().err and logging.is_progress_bar_enabled()
        with no_bars():
            assert not logging.is_progress_bar_enabled()
            with no_bars():
                pass
            assert not logging.is_progress_bar_enabled(), "put back as it was"
    finally:
        logging.enable_progress_bar() if shown else logging.disable_progress_bar()


def test_what_was_measured_is_saved_although_the_pipe_is_closed(tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr("hf_longctx.bench.show.show", closed)
    shape = ("--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--layers", 1, "--threads", 1, "--dtype", "fp32")
    done = invoke("bench", "decode", "--tokens", 65, "--rounds", 1, *shape, "--json", tmp_path / "out.json")
    assert isinstance(done.exception, (BrokenPipeError, SystemExit)) and done.exit_code
    assert (tmp_path / "out.json").stat().st_size > 1000


def test_an_error_breaks_between_words_in_a_terminal_and_nowhere_in_a_file():
    args = ["configs", "show", "meta-llama/Llama-3.1-8B-Instrct"]
    form = {"COLUMNS": "80", "NO_COLOR": "1"}
    plain = CliRunner().invoke(app, args, env=form)
    shown = CliRunner().invoke(app, args, env={**form, "FORCE_COLOR": "1"})
    assert plain.exit_code == shown.exit_code == 2
    (line,) = plain.output.splitlines()
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", one).rstrip() for one in shown.output.splitlines()]
    assert len(line) > 80 and max(map(len, lines)) <= 80 and " ".join(lines) == line
