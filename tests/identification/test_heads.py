"""``identify`` and its command: a config that fits, a model left as it was, and on trained models the right heads."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from helpers.tiny import FAMILIES, config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_longctx import (
    ConfigError,
    LongCtxConfig,
    UnsupportedModeError,
    UnsupportedModelError,
    identify,
    identify_prefill,
    patch_model,
    patched,
    unpatch_model,
)
from hf_longctx.assets import asset, assets, embedded
from hf_longctx.commands._app import app
from hf_longctx.config.words import load
from hf_longctx.evaluate.run import evaluate
from hf_longctx.identification.heads import _plain_ids, methods
from hf_longctx.io import plots
from hf_longctx.model.modules import state_of
from hf_longctx.tasks.documents import RandomTokens
from hf_longctx.tasks.tiny_language import Filler, exam

CASES = {word: load("identification.methods", word).cases for word in methods()}
QUICK = {word: some[0] for word, some in CASES.items()}
STREAMING = {"sink": 4, "recent": 64}


def trained(name: str = "tiny-llama"):
    model = AutoModelForCausalLM.from_pretrained(asset(name)).eval()
    return model, AutoTokenizer.from_pretrained(asset(name))


@pytest.fixture(scope="module")
def llama():
    return trained()


def test_every_method_is_known_and_has_a_paper():
    assert {"duo_gates", "two_needle"} < set(methods())
    for method in methods():
        assert load("identification.methods", method).paper.startswith(("arXiv:", "doi:"))


@pytest.mark.parametrize("method", methods())
def test_every_method_finds_the_retrieval_heads_of_tiny_llama(method, llama):
    config = identify(*llama, method, **STREAMING, **QUICK[method])
    scores = np.array(config.heads.scores)
    assert scores[1].min() > np.delete(scores, 1, axis=0).max(), "by ablation they are the four heads of layer 1"
    assert config.override(heads={"retrieval_fraction": 0.25}).roles() == ("SSSS", "RRRR", "SSSS", "SSSS")
    assert config.heads.source["method"] == method and config.heads.confidence == "measured"
    assert config.heads.measured["seed"] == 0
    config.check_model(llama[0].config)
    assert state_of(llama[0]) is None
    worst_first = 15.0 - scores.ravel().argsort(kind="stable").argsort()
    reversed_ = config.override(heads={"scores": worst_first.reshape(4, 4).tolist()})
    dense, kept, lost = (
        exact_match(llama[0], one, share) for one, share in ((config, 1.0), (config, 0.25), (reversed_, 0.75))
    )
    assert kept >= dense - 0.05 and lost < 0.1, (
        "a control: even three quarters, by the reversed order, lose the answers"
    )


def exact_match(model, config: LongCtxConfig, share: float) -> float:
    """Of 32 answers about two texts of 512 tokens."""
    ids, places = exam(np.random.default_rng(0), Filler(), 2, 512, 16)
    with patched(model, config, heads={"retrieval_fraction": share}), torch.no_grad():
        said = model(torch.from_numpy(ids), use_cache=False).logits.argmax(-1).numpy()
    hits = [row[at - 1] == tokens[at] for row, tokens, where in zip(said, ids, places, strict=True) for at in where]
    return float(np.mean([one.all() for one in hits]))


@pytest.mark.parametrize(
    ("method", "doubt"), [("echo_induction", "copies of random tokens"), ("retrieval_score", "in another way")]
)
def test_a_method_that_sees_nothing_says_so(method, doubt, caplog):
    # The heads of tiny-qwen3 find what a note says some tokens after the note, where earlier layers have put it.
    quick = {"echo_induction": {}, "retrieval_score": QUICK["retrieval_score"]}[method]
    config = identify(*trained("tiny-qwen3"), method, **STREAMING, **quick)
    assert config.heads.confidence == "low" and doubt in config.heads.measured["doubts"][0]
    assert doubt in caplog.text


@pytest.mark.parametrize("method", methods())
def test_the_seed_decides_everything(method, llama):
    one, same, other = (identify(*llama, method, seed=seed, **STREAMING, **CASES[method][-1]) for seed in (1, 1, 2))
    assert one == same
    assert one.heads.measured != other.heads.measured or one.heads.scores != other.heads.scores


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_and_the_config_survives_a_file(family, tmp_path):
    tokenizer = byte_bpe()
    model = tiny_model(family)
    model.resize_token_embeddings(len(tokenizer))
    config = identify(model, tokenizer, "echo_induction", tokens=40)
    config.to_yaml(tmp_path / "my.yaml")
    assert LongCtxConfig.from_yaml(tmp_path / "my.yaml") == config
    patch_model(model, tmp_path / "my.yaml")
    assert "".join(config.roles()).count("R") == 6


def test_sliding_layers_score_nothing(llama):
    tokenizer = byte_bpe()
    model = tiny_model("qwen3", sliding=32, layers=4)
    model.resize_token_embeddings(len(tokenizer))
    config = identify(model, tokenizer, "echo_induction", tokens=40)
    sliding = [i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"]
    scores = np.array(config.heads.scores)
    assert sliding == [1, 3] and (scores[sliding] == 0).all() and (scores[[0, 2]] > 0).all()
    assert (config.kv_heads, config.retrieval_heads) == (8, 4) and config.roles()[1] == "----"


def test_a_low_precision_model_is_measured(llama):
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama"), dtype=torch.bfloat16).eval()
    config = identify(model, llama[1], "two_needle", length=512, **STREAMING)
    scores = np.array(config.heads.scores)
    assert scores[1].min() > np.delete(scores, 1, axis=0).max()


def test_the_model_is_left_as_it_was():
    model, tokenizer = trained()
    before = config_for(model, "mixed")
    patch_model(model, before).train()
    model.model.layers[2].eval()
    model(torch.arange(9)[None], use_cache=False)
    model.set_attn_implementation("sdpa")
    for length in (256, 64):
        identify(model, tokenizer, "two_needle", length=length, **STREAMING)
        assert state_of(model).config == before and state_of(model).forwards == 1
        assert model.training and not model.model.layers[2].training and model.model.layers[3].training
        assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("longctx")
    with pytest.raises(ConfigError):
        identify(model, tokenizer, "two_needle", length=64, target_drop=0.1, measure_tokens=10, **STREAMING)
    assert state_of(model).config == before and model.training
    unpatch_model(model).eval()
    identify(model, tokenizer, "two_needle", length=256, **STREAMING)
    assert state_of(model) is None and not model.training


def test_the_default_share_is_that_of_duoattention_lowered_to_what_was_told_apart(llama):
    assert identify(*llama, "two_needle", length=512, **STREAMING).heads.retrieval_fraction == 0.5
    scored = identify(*llama, "retrieval_score", **QUICK["retrieval_score"], **STREAMING)
    apart = int((np.array(scored.heads.scores) > 0).sum())
    assert apart < 8 and scored.heads.retrieval_fraction == pytest.approx(apart / 16)
    asked = identify(*llama, "two_needle", length=512, retrieval_fraction=0.3, **STREAMING)
    assert asked.heads.retrieval_fraction == 0.3


def test_the_share_is_found_and_the_curve_is_written(llama):
    config = identify(*llama, "two_needle", length=512, target_drop=0.02, measure_tokens=512, **STREAMING)
    measured = config.heads.measured
    curve = {row["retrieval_heads"]: row for row in measured["curve"]}
    found = "".join(config.roles()).count("R")
    assert 2 <= found <= 4 and curve[16]["drop"] == 0 and curve[found]["drop"] <= 0.02 < curve[found - 1]["drop"]
    assert curve[found - 1]["exact_match"] < curve[16]["exact_match"] == 1.0
    assert measured["target_drop"] == 0.02 and measured["curve_tokens"] == 512
    loose = identify(*llama, "two_needle", length=512, target_drop=0.99, measure_tokens=512, **STREAMING)
    assert "".join(loose.roles()).count("R") < found


def test_the_share_is_found_by_the_likelihood_of_the_answers(llama):
    config = identify(*llama, "two_needle", length=512, target_nll=0.05, measure_tokens=512, **STREAMING)
    curve = {row["retrieval_heads"]: row for row in config.heads.measured["curve"]}
    found = "".join(config.roles()).count("R")
    assert curve[found]["rise"] <= 0.05 < curve[found - 1]["rise"] and config.heads.measured["target_nll"] == 0.05
    assert curve[found]["rise"] == pytest.approx(curve[found]["nll"] - curve[16]["nll"], abs=1e-4)


def test_with_text_the_share_is_found_by_how_likely_the_text_is(llama, tmp_path):
    (tmp_path / "text.txt").write_text("note amber falcon is lemon river cobalt tiger . the of and to in that " * 40)
    text = {"text": tmp_path / "text.txt", "measure_tokens": 512}
    curve = identify(*llama, "two_needle", length=512, target_nll=0.05, **text, **STREAMING).heads.measured["curve"]
    dense = curve[0]["perplexity"]
    assert len(curve) > 1
    assert all(row["rise"] == pytest.approx(np.log(row["perplexity"] / dense), abs=1e-3) for row in curve)


def test_with_text_the_share_is_found_by_agreement_and_perplexity(llama, tmp_path):
    (tmp_path / "text.txt").write_text("note amber falcon is lemon river cobalt tiger . the of and to in that " * 40)
    config = identify(
        *llama, "two_needle", length=512, target_drop=0.05, text=tmp_path / "text.txt", measure_tokens=512, **STREAMING
    )
    assert {"agreement", "perplexity", "drop"} <= set(config.heads.measured["curve"][0])


class NeverRun:
    """Stands in for a method whose measurement would take hours."""

    def __call__(self, method, probe):
        raise AssertionError("measured before everything was checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "echo_inductoin"}, "Did you mean 'echo_induction'"),
        ({"method": "two_needle", "steps": 3}, "steps: unknown key; fields of method 'two_needle'"),
        ({"method": "two_needle", "facts": 0}, "facts: got 0, expected a whole number"),
        ({"method": "two_needle", "retrieval_fraction": 0.5, "target_drop": 0.1}, "target_drop: it finds the share"),
        ({"method": "two_needle", "retrieval_fraction": 0.5, "target_nll": 0.1}, "target_nll: it finds the share"),
        ({"method": "two_needle", "target_drop": 0.5, "target_nll": 0.1}, "so target_drop cannot be given as well"),
        ({"method": "two_needle", "target_nll": -0.1}, "target_nll: got -0.1"),
        ({"method": "two_needle", "measure_tokens": 512}, "measure_tokens: only target_drop and target_nll"),
        ({"method": "echo_induction", "text": "some.txt"}, "text: echo_induction reads random tokens only"),
        ({"method": "two_needle", "measure_tokens": 1, "target_drop": 0.1}, "measure_tokens: got 1"),
        ({"method": "two_needle", "measure_tokens": 10, "target_drop": 0.1}, "length: got 10 tokens, but a document"),
        ({"method": "two_needle", "target_drop": "0.1"}, "target_drop: got '0.1', expected a number"),
        ({"method": "two_needle", "seed": -1}, "seed: got -1"),
        ({"method": "two_needle", "work": "somewhere"}, "work: two_needle saves nothing"),
        ({"method": "two_needle", "target_drop": 1.0}, "target_drop: got 1.0"),
        ({"method": "two_needle", "text": "no/such/file.txt"}, "cannot be read"),
        ({"method": "two_needle", "retrieval_fraction": 1.5}, "retrieval_fraction: got 1.5"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(llama, arguments, message, monkeypatch):
    for method in methods():
        monkeypatch.setattr(load("identification.methods", method), "scores", NeverRun().__call__)
    with pytest.raises(ConfigError, match=message):
        identify(*llama, **arguments)
    assert state_of(llama[0]) is None


def test_other_families_are_refused(llama):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=199))
    with pytest.raises(UnsupportedModelError):
        identify(other, llama[1])


def test_a_part_of_a_model_is_refused(llama, monkeypatch):
    monkeypatch.setattr("hf_longctx.model.plans.tensor_parallel", lambda module, family, heads: (0, 2))
    with pytest.raises(UnsupportedModeError, match="without tensor parallelism"):
        identify(*llama, "two_needle", length=256)
    assert state_of(llama[0]) is None


# The command.


def run(*arguments: str):
    return CliRunner().invoke(app, ["identify", *map(str, arguments)])


def test_the_command_writes_a_config_and_a_picture(tmp_path):
    out, plot = tmp_path / "my.yaml", tmp_path / "my.png"
    options = ("--method", "two_needle", "--set", "length=512", "--sink", 4, "--recent", 64)
    done = run(
        "hf-longctx/tiny-llama",
        *options,
        "--target-drop",
        "0.02",
        "--measure-tokens",
        "512",
        "--out",
        out,
        "--plot",
        plot,
    )
    assert done.exit_code == 0, done.output
    config = LongCtxConfig.from_yaml(out)
    found = "".join(config.roles()).count("R")
    assert f"{found} of 16 KV heads" in done.output and "exact match" in done.output
    assert config.model.ids == ("tiny-llama",) and config.heads.measured["options"]["length"] == 512
    model, _ = trained()
    patch_model(model, out)
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf-longctx/tiny-lama"], "no embedded model 'tiny-lama'; there are: tiny-"),
        (["hf-longctx/tiny-llama", "--set", "length"], "expected NAME=VALUE"),
        (["hf-longctx/tiny-llama", "--set", "length={"], "expected NAME=VALUE"),
        (["hf-longctx/tiny-llama", "--set", "sink=4"], "sink: unknown key"),
        (["hf-longctx/tiny-llama", "--dtype", "foo"], "--dtype: got 'foo'"),
        (["hf-longctx/tiny-llama", "--device", "bogus"], "--device: got 'bogus'"),
        (["hf-longctx/tiny-llama", "--plot", "my.xyz"], "--plot: got 'my.xyz'"),
        (["hf-longctx/tiny-llama", "--set", "lenght=5", "--method", "two_needle"], "Did you mean 'length'"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(arguments, message, tmp_path):
    out = tmp_path / "my.yaml"
    done = run(*arguments, "--out", out)
    assert done.exit_code == 2 and message in " ".join(done.output.split()) and not out.exists()


def test_the_output_is_a_yaml_whose_folder_is_made(tmp_path):
    done = run("hf-longctx/tiny-llama", "--out", tmp_path / "my.txt")
    assert done.exit_code == 2 and "ends in .yaml or .yml" in " ".join(done.output.split())
    options = ("--method", "two_needle", "--set", "length=256", "--sink", 4, "--recent", 64)
    done = run("hf-longctx/tiny-llama", *options, "--out", tmp_path / "new" / "my.yaml")
    assert done.exit_code == 0 and [path.name for path in (tmp_path / "new").iterdir()] == ["my.yaml"]


@pytest.mark.parametrize(
    ("loaded_from", "ids"),
    [
        ("meta-llama/Llama-3.1-8B", ("meta-llama/Llama-3.1-8B",)),
        ("/gone/since/my-model", ("my-model",)),
        ("/x/models--org--name/snapshots/0123abc", ("org/name",)),
        ("", ()),
        (".", None),
    ],
)
def test_the_id_is_the_checkpoints_name_and_never_a_path(loaded_from, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = trained()
    model.config._name_or_path = loaded_from
    config = identify(model, tokenizer, "two_needle", length=128, **STREAMING)
    assert config.model.ids == ((tmp_path.name,) if ids is None else ids)


def test_scores_in_which_no_head_stands_out_make_no_config(llama, monkeypatch):
    two_needle = load("identification.methods", "two_needle")
    monkeypatch.setattr(two_needle, "scores", lambda self, probe: torch.zeros(4, 4).double())
    with pytest.raises(ConfigError, match="two_needle scored every head 0"):
        identify(*llama, "two_needle", **STREAMING)


def test_a_model_of_windows_alone_has_nothing_to_identify():
    model = tiny_model("mistral", sliding=16)
    model.resize_token_embeddings(len(byte_bpe()))
    with pytest.raises(ConfigError, match="every layer has a sliding window"):
        identify(model, byte_bpe(), "echo_induction")


def test_a_model_without_head_and_a_foreign_tokenizer_are_refused(llama):
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no LM head"):
        identify(llama[0].model, llama[1], "echo_induction")
    with pytest.raises(ConfigError, match="its ids reach 6.., but the model knows 199"):
        identify(llama[0], byte_bpe(), "echo_induction")


def test_gates_are_not_trained_in_inference_mode(llama):
    with torch.inference_mode(), pytest.raises(UnsupportedModeError, match="inference_mode"):
        identify(*llama, "duo_gates", **STREAMING)


def test_the_picture_shows_every_head_and_outlines_the_retrieval_heads(llama):
    config = identify(*llama, "two_needle", length=512, retrieval_fraction=0.25, **STREAMING)
    figure = plots.head_map(config)
    axes, scores = figure.axes[0], np.array(config.heads.scores)
    ranks = np.asarray(axes.images[0].get_array())
    lower, equal = (compared(scores[..., None], scores.ravel()).sum(-1) for compared in (np.greater, np.equal))
    assert np.allclose(ranks, (lower + (equal - 1) / 2) / 15) and ranks.min() == 0 and ranks.max() == 1
    outlined = sorted((round(p.get_y() + 0.44), round(p.get_x() + 0.44)) for p in axes.patches)
    assert outlined == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert figure.get_suptitle() == "tiny-llama"
    roles = config.override(heads={"roles": ["SSSS", "RRRR", "SSSS", "SSSR"]})
    (only,) = plots.head_map(roles).axes
    assert len(only.patches) == 5


def test_the_sorted_scores_stand_beside_the_map_with_the_cut(llama):
    config = identify(*llama, "two_needle", length=512, retrieval_fraction=0.25, **STREAMING)
    beside = plots.head_map(config).axes[1]
    assert beside.get_ylabel() == "score" and beside.get_title() == "two_needle: 25.0% retrieval heads"
    retrieval, streaming, cut = beside.lines
    flat = sorted(np.array(config.heads.scores).ravel(), reverse=True)
    assert list(retrieval.get_ydata()) == flat[:4] and list(streaming.get_ydata()) == flat[4:]
    assert list(retrieval.get_xdata()) == [1, 2, 3, 4] and list(cut.get_xdata()) == [4.5, 4.5]
    wide = config.override(heads={"scores": [[10.0 ** -(4 * i + j) for j in range(4)] for i in range(4)]})
    assert plots.head_map(wide).axes[1].get_yscale() == "symlog" and beside.get_yscale() == "linear"
    assert len(np.unique(plots.head_map(wide).axes[0].images[0].get_array())) == 16, "all are told apart"


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("hf_longctx.commands._options.load_model", lambda *_: pytest.fail("the model was loaded"))
    out = tmp_path / "my.yaml"
    done = run("hf-longctx/tiny-llama", "--out", out, "--plot", tmp_path / "my.png")
    assert done.exit_code == 2 and "matplotlib is not installed" in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("share", "said"),
    [((), "Half of the heads is a default"), (("--retrieval-fraction", 0.25), None), (("--target-drop", 0.5), None)],
)
def test_the_command_says_where_a_default_chose_the_share(share, said, tmp_path):
    out = tmp_path / "my.yaml"
    asked = ("--set", "length=256", "--sink", 4, "--recent", 64, "--device", "cpu")
    measured = ("--measure-tokens", 256) if "--target-drop" in share else ()
    done = run("hf-longctx/tiny-llama", "--out", out, *asked, *share, *measured)
    assert done.exit_code == 0, done.output
    for word in ("--target-drop 0.02", "--retrieval-fraction 0.25", f'patch_model(model, "{out}", heads={{"kv_budget"'):
        assert (word in done.stdout) == (said is not None)
    assert (said or "KV heads are retrieval heads") in done.stdout
    assert said or "is a default" not in done.stdout


def test_a_method_without_documents_needs_no_tokenizer(llama, tmp_path):
    model, tokenizer = llama
    asked = {"method": "echo_induction", "tokens": 100, **STREAMING}
    config = identify(model, None, **asked, retrieval_fraction=0.25)
    assert config.roles()[1] == "RRRR" and config.heads.measured["tokenizer"] == "none"
    assert identify(model, None, **asked, retrieval_fraction=0.25) == config
    assert "tokenizer" not in identify(model, tokenizer, **asked).heads.measured
    model.save_pretrained(tmp_path / "model")
    out = ("--out", tmp_path / "my.yaml", "--device", "cpu")
    echo = ("--method", "echo_induction", "--set", "tokens=40")
    assert run(tmp_path / "model", *out, *echo).exit_code == 0
    for more in ((), (*echo, "--target-drop", 0.1)):
        done = run(tmp_path / "model", *out, *more)
        assert done.exit_code == 2 and "ConfigError: MODEL: the tokenizer of" in done.stderr


def test_noise_without_a_tokenizer_leaves_out_special_tokens(llama):
    inner = llama[0]
    ids = RandomTokens(_plain_ids(inner)).noise(np.random.default_rng(0), 5000)
    special = {inner.config.bos_token_id, inner.config.eos_token_id, inner.config.pad_token_id} - {None}
    known = inner.get_input_embeddings().num_embeddings
    assert special and set(ids.tolist()) == set(range(known)) - special


@pytest.mark.parametrize("given", [None, "gpt2", 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, given, _: identify(model, given),
        lambda model, given, _: identify(model, given, "duo_gates"),
        lambda model, given, _: identify(model, given, "retrieval_score"),
        lambda model, given, _: identify(model, given, "echo_induction", target_drop=0.1),
        lambda model, given, _: identify_prefill(model, given),
        lambda model, given, out: evaluate(model, given, out, tasks="needle", lengths=[256]),
    ],
    ids=["two_needle", "duo_gates", "retrieval_score", "target_drop", "identify_prefill", "evaluate"],
)
def test_a_tokenizer_that_is_none_is_named(call, given, llama, tmp_path):
    with pytest.raises(ConfigError, match=f"^tokenizer: got {given!r}, expected the model's own"):
        call(llama[0], given, tmp_path / "out")


def test_a_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="matplotlib is not installed"):
        plots.new_figure(1, 1)


def test_embedded_models_are_named_like_hub_ids(tmp_path, monkeypatch):
    assert "tiny-llama" in assets()
    assert embedded("hf-longctx/tiny-llama") == str(asset("tiny-llama"))
    assert embedded("someone/tiny-llama") == "someone/tiny-llama" and embedded("./tiny-llama") == "./tiny-llama"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf-longctx" / "tiny-llama").mkdir(parents=True)
    assert embedded("hf-longctx/tiny-llama") == "hf-longctx/tiny-llama", "a folder that is there wins"
