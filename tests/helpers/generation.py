"""The ways of generate() that are compared, and a prompt for each."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import left_padded

NEW = 12


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {"num_beams": 4},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "eos_token_id": -1},  # Transformers 5.0 needs some eos
    "chunks": {"prefill_chunk_size": 7, "cache_implementation": "dynamic"},  # and here the word
    "guided": {"guidance_scale": 1.5},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no cache": {"use_cache": False},
}


ONE_ROW = {"prompt lookup", "assisted"}


def prompt(mode: str) -> dict:
    torch.manual_seed(1)
    lengths = [45] if mode in ONE_ROW else [45, 9, 30]
    ids, mask = left_padded(lengths)
    if mode in ONE_ROW:  # a prompt that repeats itself, so that lookups are found and partly rejected
        ids[:, 20:40] = ids[:, :20]
    return {"input_ids": ids, "attention_mask": mask}


def run(model, mode: str, **more) -> torch.Tensor:
    torch.manual_seed(2)
    return model.generate(**prompt(mode), max_new_tokens=NEW, **MODES.get(mode, {}), **more)


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0")
