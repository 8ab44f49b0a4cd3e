"""``hf-longctx chat``: lines from a pipe, commands, one line about what an answer took, and Ctrl-C."""

from __future__ import annotations

import io

import pytest
from typer.testing import CliRunner

from hf_longctx.commands import chat as command
from hf_longctx.commands._app import app
from hf_longctx.commands.chat import COMMANDS, HELP, live_line
from hf_longctx.prompts.chat import Chat, Turn

ASK = "note amber basil cedar ask amber basil"


def chat(*lines: str, args: tuple[str, ...] = ()):
    args = ("chat", "hf-longctx/tiny-llama", "--max-new-tokens", "3", "--device", "cpu", *args)
    return CliRunner().invoke(app, args, input="".join(f"{line}\n" for line in lines))


def test_a_conversation_from_a_pipe(tmp_path):
    book = tmp_path / "a book.txt"
    book.write_text("amber basil cedar " * 100)
    lines = ["/help", f"/read {book}", ASK, "", "/report", "/dense", ASK, "/report", "/patched", ASK, "/reset", ASK]
    done = chat(*lines, "/quit", "never read")
    assert done.exit_code == 0, done.output
    told = done.stderr.splitlines()
    assert told[0].startswith("patched: 4 of 16 KV heads") and "300 tokens, before your next message." in told
    turns = [line for line in told if line.startswith("read ")]
    assert len(turns) == 4 and max(map(len, turns)) <= 80
    assert "reused 30" in turns[0] and ", dense |" in turns[1] and " of dense " in turns[2]
    assert all("reused 0" in turn for turn in turns[1:])
    said = done.stdout
    assert said.startswith(HELP) and "KV heads      4 of 16" in said and "dense         nothing is patched" in said
    assert "> " not in said and said.count(", reused ") == 2 == said.count("last answer "), "only where asked for"
    assert said.splitlines()[-1] and len(said.splitlines()[-1].split()) <= 3


def test_what_is_wrong_is_said_and_the_chat_goes_on(tmp_path):
    done = chat("/foo", "/repot", "/read", "/quit now", "/reset all", f"/read {tmp_path}/none", ASK)
    told = done.stderr
    assert done.exit_code == 0 and told.count("read 7,") == 1, "and the end of the input ends it"
    for said in (
        "/foo: no such command.",
        "Did you mean '/report'?",
        "/read: got '', expected a file's name after it.",
        "/quit: got 'now', expected nothing after it.",
        "/reset: got 'all'",
        "none cannot be read",
    ):
        assert said in told


def test_the_commands_are_those_of_the_help():
    assert {line.split()[0] for line in HELP.splitlines() if line.startswith("/")} == set(COMMANDS)
    assert max(map(len, HELP.splitlines())) <= 80


@pytest.mark.parametrize("stopped", [True, False])
def test_a_ctrl_c_stops_an_answer_and_not_the_program(monkeypatch, stopped):
    said = []

    def say(self, message, show):
        said.append(message)
        if len(said) > 1:
            return Turn("x", (5,), 1, 2, 10, 20, 0.1, None, False)
        if not stopped:
            raise KeyboardInterrupt
        return Turn("x", (5,), 1, 2, None, None, 0.1, None, True)

    monkeypatch.setattr(Chat, "say", say)
    done = chat("one", "two")
    assert done.exit_code == 0 and said == ["one", "two"]
    assert ("the answer stays" if stopped else "is taken back") in done.stderr


def test_a_terminal_has_a_prompt_and_forgets_a_line_at_ctrl_c(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt(), "hello", EOFError()])

    def ask(prompt):
        assert prompt == "> "
        one = next(typed)
        if isinstance(one, BaseException):
            raise one
        return one

    monkeypatch.setattr("builtins.input", ask)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert list(command.typed()) == ["hello"]


def test_options_reach_generate_and_nothing_samples_by_itself(monkeypatch):
    given = []
    real = Chat.__init__
    monkeypatch.setattr(Chat, "__init__", lambda self, *a, **k: given.append(k) or real(self, *a, **k))
    chat(args=("--temperature", "0.5", "--prefill-chunk-size", "7"))
    assert given[0]["do_sample"] and given[0]["temperature"] == 0.5 and given[0]["max_new_tokens"] == 3
    assert given[0]["chunk_size"] == 7
    chat(args=())
    assert given[1]["do_sample"] is False and given[1]["temperature"] is given[1]["top_p"] is None
    refused = chat(args=("--temperature", "-1"))
    assert refused.exit_code == 2


def test_the_line_fits_a_terminal():
    usual = Turn("", (), 240, 80320, 1_046_400_000, 2_071_000_000, 12.46, 46.2, False)
    line = live_line(usual, True)
    assert line == "read 240, reused 80320 | KV 1.05 of dense 2.07 GB, 51% | first 12.46 s, 46.2/s" and len(line) <= 80
    assert live_line(usual, False) == "read 240, reused 80320 | KV 1.05 GB, dense | first 12.46 s, 46.2/s"
    assert live_line(Turn("", (), 1, 2, None, None, None, None, True), True) == "read 1, reused 2"
