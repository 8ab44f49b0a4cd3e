"""``compare`` and its command: what it says is what the two ways do, and the model is afterwards as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.tiny import FAMILIES, config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_longctx import (
    ConfigError,
    LongCtxConfig,
    UnsupportedModelError,
    compare,
    patch_model,
    patched,
    report,
    unpatch_model,
)
from hf_longctx.assets import asset, assets
from hf_longctx.commands._app import app
from hf_longctx.commands._demo import texts, ways
from hf_longctx.evaluate import forwards
from hf_longctx.evaluate.measures import next_token
from hf_longctx.evaluate.prompts import token_ids
from hf_longctx.model.modules import state_of
from hf_longctx.model.patch import unpatched

IDS = torch.arange(3, 63)[None]
QUICK = {"max_new_tokens": 6, "rounds": 0}
CHAT = "{% for m in messages %}<|chat|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|chat|>{% endif %}"


@pytest.fixture(scope="module")
def llama():
    """(model, tokenizer, a prompt of 2048 tokens that asks for its first note, the answer)."""
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()
    text, questions, answers = next(texts(7, 1, 2048, 8))
    first = min(range(8), key=lambda i: (text[0, :-1] == questions[i, 1]).nonzero()[0])
    prompt = torch.cat([text, questions[first : first + 1]], 1)
    return model, AutoTokenizer.from_pretrained(asset("tiny-llama")), prompt, answers[first].tolist()


def traces(model) -> tuple:
    """What a patch and the modes of a model leave on it: configs, modes, hooks and attributes of every module."""
    return tuple(
        (name, id(getattr(m, "config", None)), m.training, len(m._forward_pre_hooks), tuple(sorted(m.__dict__)))
        for name, m in model.named_modules()
    )


# What it says.


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_retrieval_agree_fully(family):
    model = tiny_model(family)
    found = compare(model, IDS, config=config_for(model, "retrieval"), **QUICK)
    assert found.dense.tokens == found.patched.tokens and len(found.dense.tokens) == 6
    assert (found.same.prefix, found.same.compared, found.same.equal) == (6, 6, 1.0)
    assert found.prompt.agreement == found.answer.agreement == 1 and found.prompt.positions == 59
    assert found.prompt.kl_max < 1e-6 and found.answer.kl_max < 1e-6
    assert found.retrieval_heads == found.kv_heads == 12
    other = compare(model, IDS, config=config_for(model, "streaming", sink=1, recent=2), **QUICK)
    assert other.prompt.agreement < 1 and other.prompt.kl > 0.01 and other.answer.kl > 0.01, "a control"
    assert other.dense == found.dense and other.retrieval_heads == 0


def test_the_right_heads_agree_and_the_wrong_ones_part(llama):
    model, tokenizer, prompt, answer = llama
    _, right, wrong = ways(model)
    good = compare(model, prompt, config=right.config, tokenizer=tokenizer, **QUICK)
    assert list(good.dense.tokens[:4]) == answer and good.dense.text == tokenizer.decode(answer)
    assert good.same.prefix == good.same.compared == 5 and good.dense.rest is good.patched.rest is None
    assert good.answer.agreement == 1 and good.answer.kl < 0.02
    assert good.retrieval_heads == 4 and good.patched.cache_bytes < 0.5 * good.dense.cache_bytes
    bad = compare(model, prompt, config=wrong.config, tokenizer=tokenizer, **QUICK)
    assert bad.same.prefix == 0 and bad.same.equal < 0.5 and bad.answer.kl > 1
    assert bad.answer.agreement < 0.5 and bad.retrieval_heads == 4
    assert bad.dense.rest == bad.dense.text == good.dense.text != bad.patched.rest
    assert f"part after 0 tokens, equal at {bad.same.equal:.0%} of 5 positions" in str(bad)
    assert repr(bad.patched.rest) in str(bad) and repr(bad.dense.rest) in str(bad)
    assert "equal 'zebra" not in str(bad) and f"equal {good.dense.text!r}" in str(good)


@torch.no_grad()
def test_it_says_what_the_two_ways_do():
    model = tiny_model(dtype=torch.float64)
    config = config_for(model, "mixed", recent=8)
    found = compare(model, IDS, config=config, prompt_positions=20, max_new_tokens=9, rounds=2)
    logits, held = {}, {}
    for name in ("dense", "patched"):
        with patched(model, config) if name == "patched" else unpatched(model):
            kwargs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 9, "do_sample": False}
            out = model.generate(IDS, **kwargs)[0, 60:].tolist()
            assert getattr(found, name).tokens == tuple(out)
            logits[name] = model(torch.tensor([[*IDS[0], *found.dense.tokens]])).logits[0, 60 - 21 : -1]
            cache = model(IDS).past_key_values
            held[name] = cache.nbytes if name == "patched" else sum(2 * layer.keys.nbytes for layer in cache.layers)
    for part, where in ((found.prompt, slice(20)), (found.answer, slice(20, None))):
        want = next_token(logits["dense"][where], logits["patched"][where])
        assert (part.positions, part.agreement) == (want.positions, want.agreement)
        assert (part.kl, part.kl_max) == pytest.approx((want.kl, want.kl_max), rel=1e-4)
    assert (found.prompt.positions, found.answer.positions) == (20, 9)
    assert found.answer.kl > 0
    assert {name: getattr(found, name).cache_bytes for name in held} == held
    assert held["patched"] != held["dense"]
    assert all(side.prefill_s > 0 and side.decode_ms > 0 for side in (found.dense, found.patched))


def test_an_answer_may_end_at_once_or_be_one_token_of_one():
    model = tiny_model()
    first = compare(model, IDS, config=config_for(model, "retrieval"), **QUICK).dense.tokens
    model.generation_config.eos_token_id = [5, first[0]]
    found = compare(model, IDS, config=config_for(model, "retrieval"), max_new_tokens=6, rounds=1)
    assert found.dense.tokens == found.patched.tokens == first[:1]
    assert found.dense.decode_ms is None and found.dense.prefill_s > 0 and found.answer.positions == 1
    assert "decode ms               -          -" in str(found)
    short = compare(model, [7], config=config_for(model, "retrieval"), **QUICK)
    assert short.prompt is None and short.prompt_tokens == 1 and "end of prompt" not in str(short)


def test_the_table_and_the_dict():
    model = tiny_model()
    found = compare(model, IDS, config=config_for(model, "mixed"), max_new_tokens=6, rounds=1)
    said = str(found)
    for word in (
        "60 tokens",
        "6 of 12 KV heads",
        "KV cache MB",
        "prefill s",
        "decode ms",
        "one run each",
        "indicative",
    ):
        assert word in said, word
    assert f"{found.patched.cache_bytes / found.dense.cache_bytes:.0%} once the prompt is read" in said
    assert max(map(len, said.splitlines())) <= 120
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["dense"]["tokens"] == list(found.dense.tokens) and data["answer"]["kl"] == found.answer.kl
    untimed = compare(model, IDS, config=config_for(model, "mixed"), **QUICK)
    assert untimed.dense.prefill_s is None and "prefill s" not in str(untimed) and "indicative" not in str(untimed)
    assert "medians of 2 runs each" in str(compare(model, IDS, config=config_for(model, "mixed"), rounds=2))


def test_notes_say_what_ran_otherwise_than_asked_for():
    model = tiny_model()
    model.config.max_position_embeddings = 64
    found = compare(model, IDS, config=config_for(model, "mixed"), **QUICK)
    assert found.notes == ("prompt and answer may reach 66 tokens, the model was made for 64: both ways may be wrong",)
    assert f"note           {found.notes[0]}" in str(found)
    assert compare(model, IDS[:, :50], config=config_for(model, "mixed"), **QUICK).notes == ()


def test_chunks_give_the_same_answers():
    model = tiny_model(dtype=torch.float64)
    config = config_for(model, "mixed", recent=8)
    whole, cut = (compare(model, IDS, config=config, prefill_chunk_size=size, **QUICK) for size in (None, 7))
    assert cut.dense.tokens == whole.dense.tokens and cut.patched.tokens == whole.patched.tokens
    assert cut.prompt.kl == pytest.approx(whole.prompt.kl, rel=1e-4)


def test_overrides_reach_the_patch():
    model = tiny_model()
    config = config_for(model, "mixed")
    found = compare(model, IDS, config=config, heads={"roles": ["RRRR", "SSSS", "SSSS"]}, **QUICK)
    assert found.retrieval_heads == 4
    patch_model(model, config)
    assert compare(model, IDS, stores={"streaming": {"recent": 2}}, **QUICK).retrieval_heads == 6
    assert state_of(model).config == config


# The model is as it was.


def test_the_generation_config_plays_no_part_and_is_not_changed():
    model = tiny_model()
    want = compare(model, IDS, config=config_for(model, "mixed"), **QUICK)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    model.generation_config.cache_implementation = "static"
    before, state = copy.deepcopy(model.generation_config), torch.get_rng_state()
    assert compare(model, IDS, config=config_for(model, "mixed"), **QUICK) == want
    assert model.generation_config.to_dict() == before.to_dict()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
def test_an_unpatched_model_stays_unpatched(training):
    model = tiny_model().train(training)
    before, own = traces(model), model.config.to_dict()
    compare(model, IDS, config=config_for(model, "mixed"), **QUICK)
    assert traces(model) == before and model.config.to_dict() == own
    assert model.config._attn_implementation == "sdpa"


def test_a_patched_model_is_compared_with_itself_and_stays_patched():
    model = tiny_model()
    config = config_for(model, "mixed", recent=8)
    want = compare(model, IDS, config=config, **QUICK)
    patch_model(model, config)
    cache = model(IDS).past_key_values
    told = report(model)
    assert compare(model, IDS, **QUICK) == want
    assert state_of(model).config == config and report(model) == told and told.nbytes == cache.nbytes
    assert model(IDS[:, :1], past_key_values=cache).past_key_values.seen == 61
    other = config_for(model, "streaming")
    assert compare(model, IDS, config=other, **QUICK).retrieval_heads == 0
    assert state_of(model).config == config
    model.set_attn_implementation("sdpa")
    assert compare(model, IDS, **QUICK) == want, "switched to dense for a while, but patched"
    assert model.config._attn_implementation == "sdpa" and state_of(model).config == config
    unpatch_model(model)
    assert state_of(model) is None and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("broken", range(0, 14, 2))
@pytest.mark.parametrize("was_patched", [False, True])
def test_the_model_is_as_before_after_an_exception(broken, was_patched):
    model = tiny_model().train()
    config = config_for(model, "mixed")
    if was_patched:
        patch_model(model, config)
    before = traces(model)
    calls = []

    def interrupted(module, args):
        calls.append(state_of(model) is not None)
        if len(calls) > broken:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(model, IDS, config=config_for(model, "streaming"), max_new_tokens=4, rounds=1)
    handle.remove()
    assert len(calls) == broken + 1 and calls[-1] == (broken in (6, 8, 12)), "broken in both ways"
    assert (state_of(model) is not None) == was_patched and model.training
    if was_patched:
        assert state_of(model).config == config
        unpatch_model(model)
    else:
        assert traces(model) == before
    assert state_of(model) is None and model.config._attn_implementation == "sdpa"


def test_a_config_that_does_not_fit_is_found_before_anything_runs(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(forwards, "cache_bytes", lambda cache: pytest.fail("ran"))
    before = traces(model)
    with pytest.raises(ConfigError, match="made for another model"):
        compare(model, IDS, config=config_for(tiny_model(layers=2), "mixed"), **QUICK)
    with pytest.raises(ConfigError, match="no shipped config fits"):
        compare(model, IDS, **QUICK)
    assert traces(model) == before


@pytest.mark.parametrize("name", assets())
def test_trained_models_need_no_config(name):
    model = AutoModelForCausalLM.from_pretrained(asset(name)).eval()
    found = compare(model, torch.arange(3, 150), **QUICK)
    assert 0 < found.retrieval_heads < found.kv_heads == 16


def test_lora_is_compared_and_a_learned_prefix_refused():
    model = tiny_model()
    config = config_for(model, "mixed", recent=8)
    plain = compare(model, IDS, config=config, **QUICK)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    found = compare(lora, IDS, config=config, **QUICK)
    assert found.dense.tokens == tuple(
        lora.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)[
            0, 60:
        ].tolist()
    )
    assert found.prompt.kl != plain.prompt.kl and state_of(lora) is None
    prefix = get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(UnsupportedModelError, match="not its output embedding"):
        compare(prefix, IDS, config=config, **QUICK)


# Prompts.


def test_prompts_in_every_form_are_the_same_ids():
    model, tokenizer = tiny_model(), copy.deepcopy(byte_bpe(97 + 256))
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = CHAT
    ids = tokenizer("<|chat|>passkey it<|chat|>", add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|chat|>")) == 2
    forms = [ids, tuple(ids), torch.tensor(ids), torch.tensor([ids]), torch.tensor(ids, dtype=torch.int32)]
    forms += ["<|chat|>passkey it<|chat|>", [{"role": "user", "content": "passkey it"}]]
    for form in forms:
        assert token_ids(model, form, tokenizer).tolist() == [ids], form
    found = compare(model, forms[-1], config=config_for(model, "mixed"), tokenizer=tokenizer, **QUICK)
    assert found.prompt_tokens == len(ids)
    assert found.dense.text == tokenizer.decode(found.dense.tokens, skip_special_tokens=True)


def test_special_tokens_come_once():
    class Adds:
        bos_token = "<s>"

        def __call__(self, text, add_special_tokens=True, **kwargs):
            return {"input_ids": [1] * add_special_tokens + [1 if word == "<s>" else 9 for word in text.split()]}

    model = tiny_model()
    assert token_ids(model, "a b", Adds()).tolist() == token_ids(model, "<s> a b", Adds()).tolist() == [[1, 9, 9]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("words", "need tokenizer"),
        ([{"role": "user", "content": "words"}], "need tokenizer"),
        ([], "got list, expected a text"),
        ({"input_ids": IDS}, "got dict, expected a text"),
        ([3.5], "got list, expected a text"),
        (torch.zeros(1, 4), "got torch.float32 of shape \\(4,\\)"),
        (torch.zeros(2, 4, dtype=torch.long), "shape \\(2, 4\\), expected token ids of one prompt"),
        (torch.zeros(0, dtype=torch.long), "shape \\(0,\\)"),
        ([3, 97], "from 3 to 97, but the model knows 0 to 96"),
        ([-1, 4], "from -1 to 4"),
    ],
)
def test_other_prompts_are_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        compare(tiny_model(), prompt)


def test_messages_need_a_chat_template():
    with pytest.raises(ConfigError, match="no chat template"):
        compare(tiny_model(), [{"role": "user", "content": "hi"}], tokenizer=byte_bpe())


@pytest.mark.parametrize(
    "given",
    [{"max_new_tokens": 0}, {"rounds": -1}, {"prompt_positions": -1}, {"prefill_chunk_size": 0}, {"rounds": 1.5}],
)
def test_numbers_out_of_bounds_are_refused(given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))} must be a whole number"):
        compare(tiny_model(), IDS, **given)


# The command.


def invoke(*args: object):
    return CliRunner().invoke(app, ["compare", *map(str, args)], env={"COLUMNS": "200"})


def test_the_command(tmp_path, llama):
    model, tokenizer, prompt, answer = llama
    file, out = tmp_path / "prompt.txt", tmp_path / "out.json"
    file.write_text(tokenizer.decode(prompt[0]))
    args = ("hf-longctx/tiny-llama", "--prompt-file", file, "--max-new-tokens", 6, "--rounds", 1, "--device", "cpu")
    done = invoke(*args, "--json", out)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    want = compare(model, prompt, tokenizer=tokenizer, **QUICK)
    assert tuple(data["dense"]["tokens"]) == want.dense.tokens and data["prompt_tokens"] == prompt.shape[1]
    assert data["patched"]["cache_bytes"] == want.patched.cache_bytes
    assert data["environment"]["torch"] == torch.__version__
    assert "4 of 16 KV heads" in done.output and f"equal {want.dense.text!r}" in done.output
    wrong = config_for(model, ["RRRR", "SSSS", "SSSS", "SSSS"])
    wrong.to_yaml(tmp_path / "wrong.yaml")
    assert "part after 0 tokens" in invoke(*args, "--config", tmp_path / "wrong.yaml").output
    assert LongCtxConfig.from_yaml(tmp_path / "wrong.yaml") == wrong


def test_the_command_refuses_in_one_line(tmp_path):
    empty, words = tmp_path / "empty.txt", tmp_path / "words.txt"
    empty.write_text(" \n")
    words.write_text("note amber")
    folder = tmp_path / "x.json"
    folder.mkdir()
    for args, said in (
        (("--prompt-file", empty), "is empty"),
        (("--prompt-file", tmp_path / "none.txt"), "cannot be read"),
        (("--prompt-file", words, "--chat"), "no chat template"),
        (("--prompt-file", words, "--dtype", "fp32"), "--dtype"),
        (("--prompt-file", words, "--json", tmp_path / "out.txt"), "ends in .json"),
        (("--prompt-file", words, "--json", folder), "is a directory"),
    ):
        done = invoke("hf-longctx/tiny-llama", *args)
        assert done.exit_code == 2 and said in done.output.replace("\n", " "), done.output
        assert "Traceback" not in done.output
