"""One step of a TRL trainer with a patched policy, in an environment that has TRL: ``python trl_steps.py dpo|grpo``.

Writes one line of JSON: how many steps were done, and whether the reference model computes what the stock model does.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from helpers.tiny import config_for, left_padded, tiny_model
from hf_longctx import LongCtxCache, patch_model

PAIRS = [
    {"prompt": "w5 w6 w7", "chosen": " w8 w9", "rejected": " w10 w11 w12"},
    {"prompt": "w15", "chosen": " w8", "rejected": " w10"},
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_trainer(name: str, policy, tokenizer, folder: str):
    shared = {"output_dir": folder, "per_device_train_batch_size": 2, "max_steps": 1, "report_to": [], "use_cpu": True}
    shared |= {"save_strategy": "no", "bf16": False, "gradient_checkpointing": False}
    data, rest = Dataset.from_list(PAIRS * 2), {"processing_class": tokenizer}
    if name == "dpo":
        return DPOTrainer(policy, args=DPOConfig(**shared), train_dataset=data, **rest)
    args = GRPOConfig(beta=0.1, num_generations=2, max_completion_length=4, **shared)
    prompts = data.remove_columns(["chosen", "rejected"])
    return GRPOTrainer(policy, lambda completions, **_: list(map(len, completions)), args, prompts, **rest)


def main(name: str) -> None:
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    tokenizer, stock = word_tokenizer(), tiny_model()
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    patch_model(policy, config_for(policy))
    trainer = make_trainer(name, policy, tokenizer, folder)
    trainer.train()
    ids, mask = left_padded([60, 9])
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask, use_cache=False).logits for model in (trainer.ref_model, stock))
        kept = policy.eval()(ids, attention_mask=mask, use_cache=True).past_key_values
    said = {"steps": trainer.state.global_step, "reference": torch.equal(got, want)}
    said |= {"word": trainer.ref_model.config._attn_implementation, "policy": isinstance(kept, LongCtxCache)}
    sys.stdout.write(json.dumps(said))


main(sys.argv[1])
