"""What a long command shows on its way: a line now and then outside of a terminal; and what it says after Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_longctx.commands._app import app
from hf_longctx.config.words import words as words_of
from hf_longctx.io.progress import Progress, Stopped


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(total: int, seconds: float, **given) -> list[str]:
    """What is shown of ``total`` steps of so many seconds each."""
    to, clock = Console(file=io.StringIO(), width=60), Clock()
    with Progress("eval", total, "results", to=to, clock=clock, **given) as bar:
        for _ in range(total - given.get("done", 0)):
            clock.now += seconds
            bar.advance()
    return to.file.getvalue().splitlines()


def test_a_line_says_how_many_of_how_many_how_long_and_what_is_left():
    assert lines(4, 90) == [
        "eval: started, 0 of 4 results",
        "eval: 1 of 4 results, 0:01:30 elapsed, about 0:04:30 left",
        "eval: 2 of 4 results, 0:03:00 elapsed, about 0:03:00 left",
        "eval: 3 of 4 results, 0:04:30 elapsed, about 0:01:30 left",
        "eval: done after 0:06:00",
    ]


@pytest.mark.parametrize(
    ("total", "seconds", "least", "most"),
    [
        (10_000, 1, 166, 166 + 20),  # hours: one a minute, and every 5 %
        (1000, 0.5, 19, 19),  # minutes: every 5 %
        (1000, 0.1, 9, 9),  # no more than one in ten seconds, and a step has five
        (1000, 0.001, 0, 0),  # a second: none
        (20, 3600, 19, 19),  # hours each: every one
    ],
)
def test_lines_are_neither_many_nor_far_apart(total, seconds, least, most):
    shown = lines(total, seconds)
    assert least <= len(shown) - 2 <= most
    assert shown[0].endswith(f"started, 0 of {total} results") and "done after" in shown[-1]


def test_what_an_earlier_run_did_is_counted_and_not_taken_for_speed():
    shown = lines(40, 60, done=36)
    assert shown[:2] == [
        "eval: goes on, 36 of 40 results",
        "eval: 37 of 40 results, 0:01:00 elapsed, about 0:03:00 left",
    ]


def test_the_rest_is_estimated_by_weight():
    to, clock = Console(file=io.StringIO(), width=200), Clock()
    with Progress("eval", 2, "results", weight=10, to=to, clock=clock) as bar:
        clock.now = 60
        bar.advance(1)
        bar.advance(9)
    assert to.file.getvalue().splitlines()[1] == "eval: 1 of 2 results, 0:01:00 elapsed, about 0:09:00 left"


def test_a_terminal_gets_a_bar_and_nothing_is_shown_unasked(capfd):
    to = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})
    with Progress("eval", 2, "results", to=to) as bar:
        bar.advance()
    assert "50%" in to.file.getvalue() and "started" not in to.file.getvalue()
    with Progress("eval", 2, "results", shown=False) as bar:
        bar.advance()
    assert bar.done == 1 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("done", "saved", "message"),
    [
        (5, (1, 2, 3, 4, 5), "Stopped eval after 5 of 40 results. The same command goes on."),
        (5, (4,), "Stopped eval after 5 of 40 results. The same command goes on after 4."),
        (5, (), "Stopped eval after 5 of 40 results. They are not saved: the same command begins anew."),
        (0, (), "Stopped eval after 0 of 40 results. Nothing is lost."),
    ],
)
def test_a_stop_says_what_the_same_command_will_do(done, saved, message):
    with pytest.raises(Stopped) as stop, Progress("eval", 40, "results", to=Console(file=io.StringIO())) as bar:
        for number in range(1, done + 1):
            bar.advance(saved=number in saved)
        raise KeyboardInterrupt
    assert str(stop.value) == message


def test_a_stop_is_left_alone_where_nothing_is_shown_and_so_is_an_error():
    with pytest.raises(KeyboardInterrupt) as stop, Progress("eval", 40, "results", shown=False):
        raise KeyboardInterrupt
    assert stop.type is KeyboardInterrupt
    to = Console(file=io.StringIO(), width=60)
    with pytest.raises(ValueError, match="wrong"), Progress("eval", 40, "results", to=to):
        raise ValueError("wrong")
    assert to.file.getvalue() == "eval: started, 0 of 40 results\n"


# The commands.

SHAPE = ["--layers", 1, "--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--dtype", "fp32", "--threads", 1]
BENCH = ["--tokens", "70,150", "--rounds", 2]
MODEL = "hf-longctx/tiny-llama"
PLACE = ["--device", "cpu"]
ANEW, ON = "They are not saved: the same command begins anew.", "The same command goes on."
GATES = ["--set", "length=64", "--set", "steps=6", "--set", "checkpoint_every=2", "--set", "facts=1"]
TASK = ["--tasks", "passkey", "--lengths", 256, "--depths", "0,1", "--samples", 1]
COMMANDS = {
    "eval": (["eval", MODEL, "--out", "OUT", *TASK, *PLACE], "eval", "4 results", ON),
    "compare": (["compare", MODEL, "--prompt-file", "PROMPT", "--rounds", 1, *PLACE], "compare", "6 runs", ANEW),
    "two_needle": (
        ["identify", MODEL, "--set", "length=256", "--out", "OUT.yaml", *PLACE],
        "two needles",
        "4 layers",
        ANEW,
    ),
    "echo_induction": (
        ["identify", MODEL, "--method", "echo_induction", "--set", "tokens=40", "--out", "OUT.yaml", *PLACE],
        "echo and induction",
        "4 layers",
        ANEW,
    ),
    "retrieval_score": (
        ["identify", MODEL, "--method", "retrieval_score", "--set", "longest=128", "--set", "shortest=128"]
        + ["--set", "lengths=1", "--set", "depths=4", "--out", "OUT.yaml", *PLACE],
        "retrieval score",
        "4 documents",
        ANEW,
    ),
    "duo_gates": (
        ["identify", MODEL, "--method", "duo_gates", *GATES, "--out", "OUT.yaml", *PLACE],
        "gates",
        "6 steps",
        "The same command goes on after 2.",
    ),
    "identify-prefill": (
        ["identify-prefill", MODEL, "--length", 256, "--cost", 0.5, "--out", "OUT.yaml", *PLACE],
        "patterns",
        "4 layers",
        ON,
    ),
    "demo": (["demo", "--length", 512, "--notes", 1, "--prompts", 1], "demo", "3 prompts and ways", ANEW),
    "bench decode": (["bench", "decode", *BENCH, *SHAPE], "bench decode", "4 rounds", ANEW),
    "bench prefill": (
        ["bench", "prefill", *BENCH, *SHAPE, "--densities", 50, "--patterns", "block_topk"],
        "bench prefill",
        "4 rounds",
        ANEW,
    ),
    "bench e2e": (["bench", "e2e", *BENCH, *SHAPE], "bench e2e", "4 rounds", ANEW),
    "bench real": (
        ["bench", "real", MODEL, *BENCH, "--dtype", "fp32", "--threads", 1, "--decode-tokens", 1],
        "bench real",
        "4 rounds",
        ANEW,
    ),
    "bench batching": (
        ["bench", "batching", MODEL, "--requests", 2, "--new-tokens", 2, *BENCH, "--dtype", "fp32", "--threads", 1],
        "bench batching",
        "4 rounds",
        ANEW,
    ),
    "bench kernels": (
        ["bench", "kernels", *BENCH, "--dtype", "fp32", "--head-dim", 16, "--threads", 1],
        "bench kernels",
        "20 rounds",
        ANEW,
    ),
    "bench crossover": (
        ["bench", "crossover", "--tokens", "150,256", "--rounds", 2, "--pattern", "block_topk:top_k=1", "--heads", 4]
        + ["--kv-heads", 2, "--head-dim", 16, "--threads", 1],
        "bench crossover",
        "4 rounds",
        ANEW,
    ),
}


def invoke(words, folder):
    (folder / "prompt").write_text("note amber falcon is ruby")
    words = [str(word).replace("OUT", str(folder / "out")).replace("PROMPT", str(folder / "prompt")) for word in words]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_a_command_in_one_sentence_and_the_same_command_does_what_it_says(command, tmp_path, monkeypatch):
    words, label, total, kept = COMMANDS[command]
    counted, stop_at = Progress.advance, 3 if command in ("duo_gates", "bench decode") else 2

    def stopping(self, *given, **more):
        counted(self, *given, **more)
        if self.done == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stopping)
        done = invoke(words, tmp_path)
    assert done.exit_code == 130 and not done.stdout and "Traceback" not in done.output, done.output
    said = [f"{label}: started, 0 of {total}", f"Stopped {label} after {stop_at} of {total}. {kept}"]
    assert done.stderr.splitlines() == said
    if kept != ANEW:
        again = invoke(words, tmp_path)
        assert again.exit_code == 0, again.output
        assert again.stderr.splitlines()[0] == f"{label}: goes on, 2 of {total}"
        assert again.stderr.splitlines()[-1].startswith(f"{label}: done after")


def test_every_long_command_is_tried_above():
    import typer

    group = typer.main.get_command(app)
    there = {name for name in group.commands if name not in ("bench", "chat", "configs", "plan", "lm-eval", "serve")}
    there |= {f"bench {name}" for name in group.commands["bench"].commands if name not in ("memory", "gpu", "serve")}
    assert there == {" ".join(words[:2]) if words[0] == "bench" else words[0] for words, *_ in COMMANDS.values()}
    tried = {words[words.index("--method") + 1] for words, *_ in COMMANDS.values() if "--method" in words}
    assert len(tried) > 2 and tried | {"two_needle"} <= set(words_of("identification.methods"))


def test_ctrl_c_where_nothing_is_counted_is_one_word(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_longctx.commands.configs._list", stop)
    done = CliRunner().invoke(app, ["configs"])
    assert done.exit_code == 130 and done.stderr == "Stopped.\n" and not done.stdout


@pytest.mark.slow
def test_a_signal_ends_the_real_command(tmp_path):
    words = [sys.executable, "-m", "hf_longctx", "demo", "--prompts", "50"]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as run:
        said = next(line for line in run.stderr if line.startswith("demo"))
        assert said == "demo: started, 0 of 150 prompts and ways\n"
        assert " of 150 prompts and ways, " in run.stderr.readline(), "it is at work"
        run.send_signal(signal.SIGINT)
        out, error = run.communicate(timeout=120)
    assert run.returncode == 130 and not out and "Traceback" not in error
    assert error.splitlines()[-1].startswith("Stopped demo after ")
