"""A press of kvpress as a column of ``bench e2e``, by a stand-in module with kvpress's interface."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_longctx import ConfigError
from hf_longctx.bench import e2e, presses, show
from hf_longctx.bench.settings import Settings
from hf_longctx.cache.seam import CACHE
from hf_longctx.commands._app import app

TEXT = "HalfPress(compression_ratio=0.5)"
SHAPE = {"layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 2}
TINY = Settings((64,), ("fp32",), static=False, kvpress=TEXT, **SHAPE)


class BasePress:
    """As kvpress does: hooks after each attention module that shorten the cache, while the context is open."""

    open_for: list = []
    positions: list = []

    def __init__(self, compression_ratio: float = 0.0) -> None:
        assert 0 <= compression_ratio < 1, "Compression ratio must be between 0 and 1"
        self.ratio = compression_ratio

    @contextmanager
    def __call__(self, model):
        def shorten(module, args, kwargs, output):
            self.open_for.append(kwargs["hidden_states"].shape[1])
            layer = kwargs[CACHE].layers[module.layer_idx]
            kept = round(layer.keys.shape[2] * (1 - self.ratio))
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]

        hooks = [layer.self_attn.register_forward_hook(shorten, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class HalfPress(BasePress):
    pass


class EagerPress(BasePress):
    def __call__(self, model):
        raise ValueError("needs eager attention")


@pytest.fixture
def kvpress(monkeypatch):
    module = ModuleType("kvpress")
    module.BasePress, module.HalfPress, module.EagerPress, module.KVPressPipeline = (
        BasePress,
        HalfPress,
        EagerPress,
        int,
    )
    monkeypatch.setitem(sys.modules, "kvpress", module)
    BasePress.open_for.clear()


def test_the_prompt_is_read_inside_of_the_press_and_the_token_outside(kvpress, monkeypatch):
    positions, make_model = set(), e2e.make_model

    def noted(*args):
        model = make_model(*args)
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: positions.add(str(kwargs.get("position_ids"))), with_kwargs=True
        )
        return model

    monkeypatch.setattr(e2e, "make_model", noted)
    (result,) = e2e.run(TINY)
    assert list(result["columns"]) == ["stock", "all retrieval", "half streaming", "all streaming", TEXT]
    column = result["columns"][TEXT]
    assert column["kernel"] == "sdpa" and column["kept"] == 0.5 and len(column["decode_ms"]["raw_ms"]) == 2
    assert BasePress.open_for == [64] * 2 * (1 + 1 + 2), "layers x (tried, warmed up, two rounds), never one token"
    assert positions == {"None", "tensor([[64]])"}, "the shortened cache does not know the token's position"
    assert not any("kept" in other for name, other in result["columns"].items() if name != TEXT)
    console = Console(width=250, file=io.StringIO())
    show.show(console, show.as_json("e2e", TINY, [result]))
    assert f"{TEXT}, fp32 at 64: holds 50.0% of the prompt's K/V; answers not compared." in console.file.getvalue()


def test_a_press_that_does_not_run_is_named_with_its_reason(kvpress):
    (result,) = e2e.run(Settings((64,), ("fp32",), static=False, kvpress="EagerPress", **SHAPE))
    assert result["not_measured"] == {"EagerPress": "ValueError: needs eager attention"}
    assert list(result["columns"]) == ["stock", "all retrieval", "half streaming", "all streaming"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HalfPres", "Did you mean 'HalfPress'"),
        ("KVPressPipeline", "kvpress: got 'KVPressPipeline'"),
        ("HalfPress(ratio=0.5)", "HalfPress\\(ratio=0.5\\) was refused: .*unexpected keyword"),
        ("HalfPress(compression_ratio=2)", "was refused: Compression ratio must be"),
        ("HalfPress(0.5)", "expected NAME or NAME"),
        ("HalfPress(**{'a': 1})", "expected NAME or NAME"),
        ("HalfPress(compression_ratio=open('x'))", "expected NAME or NAME"),
        ("os.system('x')", "expected NAME or NAME"),
        ("HalfPress(", "expected NAME or NAME"),
        ("", "expected NAME or NAME"),
    ],
)
def test_what_is_no_press_is_an_error(text, message, kvpress):
    with pytest.raises(ConfigError, match=message):
        presses.find(text)


def test_without_kvpress_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    done = CliRunner().invoke(app, ["bench", "e2e", "--kvpress", TEXT, "--tokens", "64"])
    assert done.exit_code == 2 and done.stderr.splitlines()[-1].startswith("ConfigError")
    assert "Traceback" not in done.output
    assert "an environment of its own (pip install -e . kvpress)" in done.stderr
