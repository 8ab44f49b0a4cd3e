"""Tokenizers of several kinds made on the spot, and the cases that every task is held to."""

from __future__ import annotations

import functools

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.cases import cases
from helpers.tiny_tokenizer import byte_bpe
from hf_longctx.assets import asset
from hf_longctx.config.words import load, words
from hf_longctx.errors import ConfigError
from hf_longctx.tasks import task_from
from hf_longctx.tasks._words import sentences
from hf_longctx.tasks.language import SAID, Language, language_for

TEXTS = ("bytes", "bos_eos", "wordpiece", "unigram", "legacy", "spanning")
KINDS = (*TEXTS, "tiny")
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CASES = tuple(cases("tasks.synthetic"))
DRAWN = tuple(word for word in words("tasks.synthetic") if not load("tasks.synthetic", word).own)
COUNTED = tuple(word for word in DRAWN if not load("tasks.synthetic", word).deep)


def corpus() -> list[str]:
    said = sentences(np.random.default_rng(0), 150)
    return [*said, "What is the code of the key in the text below? The value is: " + " ".join(SAID), SAID]


def trained(tokenizer: Tokenizer, trainer, **special) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def around(tokenizer: PreTrainedTokenizerFast, first: str, last: str) -> PreTrainedTokenizerFast:
    """The tokenizer, adding a token before and one after every text."""
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (first, last)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=ids
    )
    return tokenizer


def bos_eos() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return around(trained(made, trainer, bos_token="<s>", eos_token="</s>", chat_template=CHAT), "<s>", "</s>")


def wordpiece() -> PreTrainedTokenizerFast:
    """Lower case, no memory of spaces, pieces that begin with ##."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, initial_alphabet=list(SAID))
    extra = [a + b for a in SAID for b in SAID]  # so that every letter and digit can stand at either place
    made.train_from_iterator([*corpus(), *extra], trainer)
    return around(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]"), "[CLS]", "[SEP]")


def unigram() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list(SAID)
    )
    return trained(made, trainer, bos_token="<s>", eos_token="</s>")


def legacy() -> PreTrainedTokenizerFast:
    """Puts a space before every text, and begins it with a token: as Llama 2 does."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, max_token_length=8)
    tokenizer = trained(made, trainer, bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    return tokenizer


def spanning() -> PreTrainedTokenizerFast:
    """Byte-level, with tokens that run over spaces and full stops."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))


@functools.cache
def tokenizer_of(kind: str):
    if kind == "tiny":
        return AutoTokenizer.from_pretrained(asset("tiny-llama"))
    made = {"bytes": byte_bpe, "bos_eos": bos_eos, "wordpiece": wordpiece, "unigram": unigram}
    return (made | {"legacy": legacy, "spanning": spanning})[kind]()


@functools.cache
def language_of(kind: str) -> Language:
    return language_for(tokenizer_of(kind))


def can_say(kind: str, case: str) -> bool:
    """Whether the embedded models' language has words for a case; every text has."""
    if kind != "tiny":
        return True
    try:
        task_from(case).check(language_of(kind))
    except ConfigError:
        return False
    return True


def spoken() -> list[tuple[str, str]]:
    """(kind, case) of every tokenizer and every case that its language can say."""
    return [(kind, case) for kind in KINDS for case in CASES if can_say(kind, case)]
