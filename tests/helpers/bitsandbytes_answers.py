"""What tiny models with weights of bitsandbytes answer, patched and not, as JSON.

``tests/slow/test_bitsandbytes.py`` runs it as ``python -m helpers.bitsandbytes_answers`` where that is installed.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_longctx import patch_model
from hf_longctx.model.modules import state_of

from .tiny import DenseMask, config_for, tiny_config

IDS = torch.arange(3, 83)[None]
KINDS = {
    "8 bits": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
}


@torch.no_grad()
def answers(plain, light) -> dict:
    """Largest differences of logits: of the quantised model to others, and of the patched one to what it must equal."""
    want, said = light(IDS).logits, light.generate(IDS, max_new_tokens=8, do_sample=False)

    def away(model, other=want) -> float:
        return (model(IDS).logits - other).abs().max().item()

    found = {"quantised": away(plain), "linear": type(light.model.layers[0].mlp.up_proj).__name__}
    config = config_for(light, kernel="reference")
    with DenseMask(light, config):
        masked = light(IDS).logits
    patch_model(light, config_for(light, "retrieval", kernel="stock"))
    same = torch.equal(light.generate(IDS, max_new_tokens=8, do_sample=False), said)
    found |= {"retrieval": away(light), "tokens": same, "patched": state_of(light) is not None}
    patch_model(light, config)
    found |= {"streaming": away(light, masked), "control": away(light)}
    return found


def main() -> None:
    torch.manual_seed(0)
    config = tiny_config("llama", group=4, head_dim=16)
    config.intermediate_size, config.eos_token_id = 64, None
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        load = AutoModelForCausalLM.from_pretrained
        found = {
            kind: answers(load(folder), load(folder, quantization_config=BitsAndBytesConfig(**how)))
            for kind, how in KINDS.items()
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
