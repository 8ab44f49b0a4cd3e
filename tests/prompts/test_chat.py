"""A chat that goes on from its cache says what generate() says over the whole conversation, at every turn."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe

from hf_longctx import ConfigError, patched
from hf_longctx.model.modules import state_of
from hf_longctx.prompts import chat as module
from hf_longctx.prompts.chat import Chat

TEMPLATE = (
    "{% for m in messages %}<|chat|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|chat|>assistant\n{% endif %}"
)
# As of models that think: what they thought is left out of the history.
FORGETFUL = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}{{ m['content'][3:] }}{% else %}{{ m['content'] }}{% endif %}",
)
TURNS = ("Which pass key is it?", "And " + "again, " * 50, "Thanks.")
NEW = 9


def chat_of(template: str | None = TEMPLATE, roles: str = "mixed", **options) -> Chat:
    tokenizer = byte_bpe(259)  # bytes alone: an answer in ASCII is read back as the same tokens
    tokenizer.chat_template = template
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = None
    odd = [token for token in range(len(tokenizer)) if not " " <= tokenizer.decode([token]) <= "~" or token < 3]
    given = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": odd, "pad_token_id": 1, **options}
    return Chat(model, tokenizer, config_for(model, roles, recent=24), **given)


def fresh(chat: Chat, ids: torch.Tensor) -> list[int]:
    """What the model says after ``ids``, all of it read anew."""
    out = chat.model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **chat.options)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL, None], ids=["template", "forgetful", "plain"])
@pytest.mark.parametrize("way", ["patched", "dense"])
def test_every_turn_says_what_a_fresh_reading_says(template, way, tmp_path):
    chat = chat_of(template)
    chat.use(way == "patched")
    file = tmp_path / "book.txt"
    file.write_text("The pass key is 51234. Remember it. " * 12)
    assert chat.read(file) > 300
    said: list[str] = []
    before = 0
    for number, message in enumerate(TURNS):
        shown: list[str] = []
        turn = chat.say(message, shown.append)
        prompt = chat.ids[: len(chat.ids) - NEW]
        messages = chat._messages[:-1]
        assert prompt.tolist() == chat._render(messages).tolist() and messages[-1]["content"].endswith(message)
        assert list(turn.tokens) == fresh(chat, prompt) and "".join(shown) == turn.text
        assert turn.text == chat.tokenizer.decode(turn.tokens) and not turn.stopped
        assert turn.read + turn.reused == len(prompt)
        if template == FORGETFUL and number:
            # The answer is rendered anew: what came before it is reused where a cache can still go back there.
            assert turn.reused == (before - NEW if way == "patched" else 0)
        elif number:
            assert turn.reused == before - 1, "all but the last token, which the next forward reads"
        elif way == "patched":
            assert turn.reused > 300 and turn.read < 80, "the document is read already"
        else:
            assert turn.reused == 0
        before = len(chat.ids)
        said.append(turn.text)
    assert len(set(said)) == 3, "a control"


def test_the_bytes_are_those_of_the_cache_and_of_a_dense_one(tmp_path):
    chat = chat_of()
    file = tmp_path / "book.txt"
    file.write_text("The pass key is 51234. Remember it. " * 30)
    chat.read(file)
    turn = chat.say("Which?")
    tokens = len(chat.ids) - 1
    text = chat.model.config
    each = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert turn.nbytes_dense == each * tokens
    assert 0 < turn.nbytes < turn.nbytes_dense
    chat.use(False)
    dense = chat.say("Which?")
    assert dense.nbytes == dense.nbytes_dense == each * (len(chat.ids) - 1)
    assert len(chat._prompts) == 0


def test_it_goes_on_dense_and_patched_again():
    chat = chat_of()
    first = chat.say(TURNS[0])
    chat.use(False)
    assert not chat.patched and state_of(chat.model) is None
    second = chat.say(TURNS[1])
    assert second.reused == 0 and first.text in chat.tokenizer.decode(chat.ids)
    assert list(second.tokens) == fresh(chat, chat.ids[:-NEW])
    chat.use(False)
    assert chat.say(TURNS[2]).reused > 0, "nothing changed"
    chat.use(True)
    third = chat.say(TURNS[2])
    assert third.reused == 0 and list(third.tokens) == fresh(chat, chat.ids[:-NEW])
    with patched(chat.model, chat._config.override(stores={"streaming": {"recent": 2}})):
        assert list(third.tokens) != fresh(chat, chat.ids[:-NEW]), "a control: other heads say another thing"
    chat.reset()
    again = chat.say(TURNS[0])
    assert again.text == first.text and again.reused == 0


@pytest.mark.parametrize("way", ["patched", "dense"])
def test_a_ctrl_c_keeps_what_was_said(way, monkeypatch):
    chat = chat_of()
    chat.use(way == "patched")
    chat.say(TURNS[0])
    whole = chat.say("Go on.")
    chat.reset()
    chat.say(TURNS[0])
    pieces: list[str] = []

    def stop(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    class Spelled(module._Live):  # text comes in whole words; here every token shows something
        def put(self, value):
            spoken = not self.next_tokens_are_prompt
            super().put(value)
            if spoken:
                self.show("x")

    monkeypatch.setattr(module, "_Live", Spelled)
    turn = chat.say("Go on.", stop)
    monkeypatch.undo()
    assert turn.stopped and turn.nbytes is None and 0 < len(turn.tokens) < NEW
    assert turn.tokens == whole.tokens[: len(turn.tokens)]
    after = chat.say("And then?")
    assert list(after.tokens) == fresh(chat, chat.ids[:-NEW])
    assert turn.text in chat.tokenizer.decode(chat.ids)


def test_a_ctrl_c_while_reading_takes_the_message_back():
    chat = chat_of()
    chat.say(TURNS[0])
    ids = chat.ids.tolist()

    def interrupted(module, args):
        raise KeyboardInterrupt

    handle = chat.model.model.layers[1].register_forward_pre_hook(interrupted)
    for patched_way in (True, False):
        chat.use(patched_way)
        with pytest.raises(KeyboardInterrupt):
            chat.say(TURNS[1])
    handle.remove()
    assert chat.ids.tolist() == ids and len(chat._messages) == 2
    chat.use(True)
    assert list(chat.say(TURNS[2]).tokens) == fresh(chat, chat.ids[:-NEW])


def test_a_long_chat_keeps_two_prompts_alone():
    chat = chat_of(max_new_tokens=2)
    for number in range(5):
        chat.say(f"message {number}")
        assert len(chat._prompts) == 2


@pytest.mark.parametrize("way", ["patched", "dense"])
@pytest.mark.parametrize("sampled", [False, True])
def test_an_answer_of_nan_is_refused_and_the_chat_goes_on(way, sampled):
    chat = chat_of(do_sample=sampled, logits_processor=[lambda ids, scores: scores])
    chat.use(way == "patched")
    head = chat.model.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    with pytest.raises(ConfigError, match="logits of this model are NaN.*bfloat16 or float32"):
        chat.say("Hi")
    assert not chat._messages and not len(chat.ids)
    with torch.no_grad():
        head.copy_(kept)
    assert len(chat.say("Hi").tokens) == NEW


def test_what_a_template_or_a_file_refuses(tmp_path):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    with pytest.raises(ConfigError, match="refuses these messages: no system role"):
        chat_of(refusing, system="Be brief.")
    chat = chat_of(system="Be brief.")
    chat.say("Hi")
    assert "Be brief." in chat.tokenizer.decode(chat.ids)
    for content, message in ((b"\xff\xfe\xff", "cannot be read"), (b" \n", "is empty")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            chat.read(tmp_path / "x")
    with pytest.raises(ConfigError, match="cannot be read"):
        chat.read(tmp_path / "none")
