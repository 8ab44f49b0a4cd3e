"""A byte-level BPE tokenizer made on the spot, of the kind Llama 3 and Qwen use."""

from __future__ import annotations

import copy
import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def byte_bpe(vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """Words with a leading space as single tokens, beside 256 bytes; bos, eos and a chat token are special.

    Everyone gets one of his own, so that a test may change it.
    """
    return copy.deepcopy(_trained(vocab_size))


@functools.cache
def _trained(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = "bcdfghjklmnp"
    words = [a + "a" + b + "o" + c for a in letters for b in letters[:6] for c in letters[:5]]
    text = [" ".join(words)] * 3 + ["Passkey number is Remember it"] * 3
    special = ["<s>", "</s>", "<|chat|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
