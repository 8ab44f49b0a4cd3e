"""The commands as a person meets them: help that hides nothing, tables of whole words, mistakes in one line."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import every_command
from rich.console import Console
from rich.text import Text
from transformers.utils import logging
from typer.testing import CliRunner

import hf_longctx
from hf_longctx.assets import asset
from hf_longctx.commands import _app
from hf_longctx.commands._app import app
from hf_longctx.commands._options import load_model, no_bars
from hf_longctx.io.console import _wrapped, tables

NAMES = ["", "kernel", "ms per layer", "vs all retrieval", "read at GB/s", "of sum"]
ROWS = [["[bold]fp32[/]"], ["half streaming", "native", "3.81 (1.84 - 6.44)", "1.00x", "4.26", "5%"], None, ["stock"]]


EVERY = dict(every_command())


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


FUNCTION = '''"""One more."""

import typer


def command(times: int = 1) -> None:
    """Says hello."""
    typer.echo("hello " * times)
'''
GROUP = '''"""A group."""

import typer

app = typer.Typer(help="A group.")


@app.command("one")
def one() -> None:
    """One."""
    typer.echo("one")


@app.command("two")
def two() -> None:
    """Two."""
'''


def copy_of_the_package(folder: Path) -> Path:
    """A folder to run ``python -m hf_longctx`` in, whose package may be added to."""
    package = Path(hf_longctx.__file__).parent
    shutil.copytree(package, folder / "hf_longctx", ignore=shutil.ignore_patterns("__pycache__", "_native", "assets"))
    shutil.copytree(
        package / "assets", folder / "hf_longctx" / "assets", ignore=shutil.ignore_patterns("*.safetensors")
    )
    return folder / "hf_longctx" / "commands"


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "hf_longctx", *words]
    return subprocess.run(
        run, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
    )


def test_a_file_in_the_folder_is_a_command(tmp_path):
    """One new file each: a function, a group, and a file that is no command."""
    commands = copy_of_the_package(tmp_path)
    (commands / "say_hello.py").write_text(FUNCTION, "utf-8")
    (commands / "more.py").write_text(GROUP, "utf-8")
    (commands / "_helper.py").write_text("raise AssertionError('no command')\n", "utf-8")
    shown = run_in(tmp_path, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "say-hello" in shown.stdout and "Says hello." in shown.stdout and "A group." in shown.stdout
    assert "helper" not in shown.stdout
    assert run_in(tmp_path, "say-hello", "--times", "2").stdout.strip() == "hello hello"
    assert run_in(tmp_path, "more", "one").stdout.strip() == "one"


def test_every_file_of_the_folder_is_a_command():
    files = {path.stem for path in Path(_app.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert files == {words[0].replace("-", "_") for words in EVERY} and files
    assert sum(len(command.params) for command in EVERY.values()) > 100


@pytest.mark.parametrize("words", [(), *{words[:-1] for words in EVERY if len(words) > 1}, *EVERY], ids=" ".join)
def test_help_at_80_columns_clips_nothing(words):
    if words == ("lm-eval",):
        pytest.skip("its help is lm-eval's own")
    shown = invoke(*words, "--help", width=80).stdout
    assert "Usage" in shown and "\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for param in EVERY[words].params if words in EVERY else ():
        for name in (*param.opts, *param.secondary_opts):
            assert name in shown, name


@pytest.mark.parametrize(
    ("words", "short", "long"),
    [
        (("plan", "tiny-llama", "--memory", "1GB", "--context", "8k"), "--chunk", "--prefill-chunk-size"),
        (("bench", "memory", "tiny-llama", "--memory", "1GB"), "--chunk", "--prefill-chunk-size"),
        (("configs", "show", "tiny-llama"), "--fraction", "--retrieval-fraction"),
    ],
)
def test_a_short_name_stands_for_its_long_one(words, short, long):
    outputs = [invoke(*words, name, "x").output for name in (short, long)]
    assert outputs[0] == outputs[1] and long in outputs[0] and "No such option" not in outputs[0]
    assert f"Or {short}." in invoke(*words, "--help").stdout


def test_commands_do_not_import_each_other():
    for path in Path(_app.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert (node.module or "_").startswith("_"), f"{path.name} imports {node.module}"


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
    of_models = [words for words in EVERY if "--device" in options(words)]
    assert len(of_models) > 1
    for option in ("--dtype", "--device"):
        assert len({options(words)[option] for words in of_models}) == 1
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
