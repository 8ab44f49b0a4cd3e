"""What commands write: refused before anything is measured where it cannot be; pictures hold the JSON's figures."""

from __future__ import annotations

import sys

import pytest
from helpers.commands import every_command
from typer.testing import CliRunner

from hf_longctx import ConfigError
from hf_longctx.bench import figures
from hf_longctx.commands._app import app
from hf_longctx.commands._options import check_output

SHAPE = ["--heads", "8", "--kv-heads", "4", "--head-dim", "16", "--rounds", "2", "--dtype", "fp32", "--threads", "1"]
COMMANDS = {
    "decode": ["--tokens", "65,150", "--layers", "2"],
    "prefill": ["--tokens", "65,150", "--layers", "2", "--densities", "50", "--patterns", "block_topk"],
    "e2e": ["--tokens", "65", "--layers", "2"],
    "crossover": ["--tokens", "256", "--pattern", "block_topk:top_k=1"],
    "kernels": ["--tokens", "65"],
    "memory": ["tiny-llama", "--memory", "2MB"],
}
ENVIRONMENT = {"cpu": "a processor", "threads": 2, "cores": 2, "torch": "2", "transformers": "5", "others": 0.0}
SETTINGS = {"layers": 1, "heads": 8, "kv_heads": 4, "rounds": 2, "head_dim": 16}


def times(ms: float) -> dict:
    return {"median_ms": ms, "low_ms": ms / 2, "high_ms": 2 * ms, "raw_ms": [ms]}


def made(benchmark: str, results: list[dict], **facts) -> dict:
    return {"benchmark": benchmark, "environment": ENVIRONMENT, "settings": SETTINGS, "results": results, **facts}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def bars(axes) -> dict[str, float]:
    names = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(names, (patch.get_width() for patch in axes.patches), strict=True))


@pytest.mark.parametrize("benchmark", COMMANDS)
def test_the_command_draws_a_picture(benchmark, tmp_path):
    path = tmp_path / "out.png"
    shape = SHAPE if benchmark != "memory" else ["--dtype", "fp32"]
    done = CliRunner().invoke(app, ["bench", benchmark, *COMMANDS[benchmark], *shape, "--png", str(path)])
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


def with_an_output() -> dict[tuple[str, ...], list[str]]:
    """Every command that writes a file -> its options that name one."""
    found = {}
    for path, command in every_command():
        names = [param.opts[0] for param in command.params if param.opts[0] in ("--json", "--png", "--out", "--plot")]
        files = [name for name in names if not (path == ("eval",) and name == "--out")]  # that one is a folder
        if files:
            found[path] = files
    return found


def filled(path: tuple[str, ...]) -> list[str]:
    """What a command must be given beside its output."""
    needed = {"model": "tiny-llama", "prompt_file": "prompt.txt", "context": "100", "memory": "2MB", "out": "made.yaml"}
    words = []
    for param in dict(every_command())[path].params:
        if param.required:
            words += [*([] if param.param_type_name == "argument" else [param.opts[0]]), needed[param.name]]
    return words


OUTPUTS = [(path, option) for path, options in with_an_output().items() for option in options]


@pytest.mark.parametrize(("path", "option"), OUTPUTS, ids=lambda one: one if isinstance(one, str) else " ".join(one))
@pytest.mark.parametrize(("name", "message"), [("file/below/x", "cannot be made"), ("x.txt", "expected a name")])
def test_an_output_that_cannot_be_written_is_refused_first(path, option, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ending = {"--json": ".json", "--out": ".yaml"}.get(option, ".png")
    name = name if name.endswith(".txt") else name + ending
    words = [*path, *filled(path), option, name]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 2 and done.stderr.startswith(f"ConfigError: {option}: ") and message in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_a_folder_that_is_missing_is_made(option, tmp_path):
    path = tmp_path / "new" / "folder" / f"x.{option[2:]}"
    done = CliRunner().invoke(app, ["bench", "decode", *COMMANDS["decode"], *SHAPE, option, str(path)])
    assert done.exit_code == 0 and path.stat().st_size > 1000, done.output


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="--json: the folder .* cannot be written to"):
        check_output(tmp_path / "x.json", (".json",), "--json")


def test_a_picture_without_matplotlib_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("hf_longctx.bench.decode.run", lambda *args: pytest.fail("measured something"))
    done = CliRunner().invoke(app, ["bench", "decode", "--png", str(tmp_path / "x.png")])
    assert done.exit_code == 2 and "matplotlib is not installed" in done.stderr


def test_bars_are_the_medians_and_say_how_many_times_faster():
    columns = {"stock": {"ms": times(8.0)}, "all streaming": {"ms": times(2.0)}}
    chosen = {"block_topk": {"ms": times(0.5), "share_of_stock": 0.0625}}
    results = [
        {"dtype": "fp32", "tokens": n, "heads": 4, "kv_heads": 2, "columns": columns, "patterns": chosen}
        for n in (100, 200, 300, 400)
    ]
    figure = figures.draw(made("prefill", results))
    assert [axes.get_title() for axes in figure.axes] == [f"fp32, {n} tokens" for n in (100, 200, 300, 400)]
    axes = figure.axes[0]
    assert bars(axes) == {"stock": 8, "all streaming": 2, "choosing: block_topk": 0.5}
    assert texts(axes) == ["8", "2   4.00x", "0.5   6.2% of stock"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[4, 16], [1, 4], [0.25, 1]]
    assert axes.get_xlim()[1] > 16 and "do not quote" not in figure.get_suptitle()
    assert "1 layer, 4 query and 2 KV heads" in figure.get_suptitle()
    busy = {**made("prefill", results), "environment": {**ENVIRONMENT, "others": 0.5}}
    assert "other processes took 50%" in figures.draw(busy).get_suptitle()


def test_e2e_draws_prompt_and_token_with_the_ratios_of_the_table():
    stock = {"prefill_ms": times(80.0), "decode_ms": times(4.0), "prefill_ratio": 1.0, "decode_ratio": 1.0}
    half = {"prefill_ms": times(40.0), "decode_ms": times(1.0), "prefill_ratio": 0.8, "decode_ratio": 0.2}
    result = {"dtype": "bf16", "tokens": 64, "columns": {"stock": stock, "half streaming": half}}
    prompt, token = figures.draw(made("e2e", [result])).axes
    assert bars(prompt) == {"stock": 80, "half streaming": 40} and bars(token) == {"stock": 4, "half streaming": 1}
    assert texts(prompt)[1] == "40   1.25x" and texts(token)[1] == "1   5.00x"


def test_the_crossing_is_marked_or_said_to_be_missing():
    results = [
        {"dtype": word, "tokens": n, "columns": {"dense": {"ms": times(n)}, "sparse": {"ms": times(2000)}}}
        for word in ("fp32", "bf16")
        for n in (1024, 4096)
    ]
    verdicts = {"fp32": {"min_tokens": 4096}, "bf16": {"min_tokens": None}}
    won, lost = figures.draw(made("crossover", results, crossover=verdicts)).axes
    assert [list(line.get_ydata()) for line in won.lines[:2]] == [[1024, 4096], [2000, 2000]]
    assert len(won.lines) == 3 and list(won.lines[2].get_xdata()) == [4096, 4096] and won.get_title() == "fp32"
    assert [text.get_text() for text in won.get_legend().get_texts()][2] == "sparse wins from 4096 on"
    assert len(lost.lines) == 2 and lost.get_title() == "bf16: sparse did not win at the longest"


def test_contexts_without_a_limit_or_without_room_are_words():
    results = [{"way": "dense", "longest": 100}, {"way": "patched", "longest": 250}]
    results += [{"way": "endless", "longest": None}, {"way": "nothing", "longest": 0}]
    settings = {"memory": 24 * 10**9, "dtype": "bf16", "batch": 1, "chunk": 64}
    data = made("memory", results, model="a-model") | {"settings": settings}
    figure = figures.draw(data)
    assert bars(figure.axes[0]) == {"dense": 100, "patched": 250, "endless": 0, "nothing": 0}
    assert texts(figure.axes[0]) == ["100", "250   2.50x", "no limit", "none: the weights do not fit"]
    assert "a-model in 24 GB, bf16, 1 sequence, read in chunks of 64" in figure.get_suptitle()
