"""A tiny random model of every record of ``patches/`` that this Transformers has, in float64 throughout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx.cache.seam import CACHE
from hf_longctx.config.model import text_config
from hf_longctx.model.family import families, find_family
from hf_longctx.model.tiny import tiny_copy

TYPES = tuple(name for name in families() if name in CONFIG_MAPPING)
WINDOW = 9
OPEN = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}  # what some configs leave to the checkpoint
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
# What the checkpoints have and the default config has not, or what makes Transformers count pads.
SET = {"lfm2": CONVOLUTIONS, "lfm2_moe": CONVOLUTIONS, "llama4_text": {"attn_temperature_tuning": False}}


class Case(NamedTuple):
    """A model type, and whether those of its layers that may have a sliding window have one."""

    model_type: str
    window: bool

    def __str__(self) -> str:
        return self.model_type + ("-window" if self.window else "")


def cases_of(model_type: str) -> list[Case]:
    """With windows where the type has some; a second one without, where all layers would have one."""
    sliding = find_family(model_type).sliding
    return [Case(model_type, window) for window in {"none": (False,), "all": (True, False)}.get(sliding, (True,))]


def record(model_type: str) -> tuple:
    """What a record says beside its name: types of one record take the same paths through the package."""
    family = find_family(model_type)
    return (family.layers, family.attention, family.key_projection, family.sliding, *sorted(family.scores.items()))


CASES = [case for model_type in TYPES for case in cases_of(model_type)]
# Of each record one type, for what need not be asked of every type in every run.
ONE_EACH = tuple({record(name): name for name in reversed(TYPES)}.values())


def tiny_config(case: Case):
    """A config that has a layer of each kind; without windows of its own where the type can do without.

    Of a type that no causal language model is made of it is that of the multimodal model around it.
    """
    family = find_family(case.model_type)
    sliding = family.sliding
    alone = CONFIG_MAPPING[case.model_type] in MODEL_FOR_CAUSAL_LM_MAPPING
    name = case.model_type if alone else family.multimodal[0]
    default = AutoConfig.for_model(name)
    default = AutoConfig.for_model(name, **{k: v for k, v in OPEN.items() if getattr(default, k, 0) is None})
    changes = dict(SET.get(case.model_type, {}))
    small = text_config(tiny_copy(default, **changes))
    if sliding == "all":
        changes["sliding_window"] = WINDOW if case.window else None
    elif sliding == "layer_types" and len(set(small.layer_types)) == 1:
        types = [("sliding_attention", "full_attention")[i % 2] for i in range(small.num_hidden_layers)]
        changes |= {"layer_types": types, "sliding_window": WINDOW}
    if hasattr(small, "use_sliding_window"):
        changes["use_sliding_window"] = case.window
    small = tiny_copy(default, initializer_range=0.3, **changes)
    text_config(small)._experts_implementation = "eager"  # grouped products know no float64
    return small


def tiny_model(case: Case):
    """A random model in float64, on eager attention; sinks are logits of about 1."""
    config = tiny_config(case)
    make = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = make.from_config(config, dtype=torch.float64, attn_implementation="eager")
    in_float64(model)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def in_float64(model) -> None:
    """The weights that Transformers keeps in float32 as well, of routers for example."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()


def softmax_in_float64(monkeypatch) -> None:
    """Eager attention of Transformers takes its softmax in float32; here not of float64."""
    softmax = torch.nn.functional.softmax

    def in_its_dtype(x, dim=None, dtype=None, **more):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", in_its_dtype)


def stay_in_float64(monkeypatch) -> None:
    """Norms, routers and eager softmaxes of Transformers go to float32 and back; here they do not."""
    tensor = torch.Tensor
    to, kind, single = tensor.to, tensor.type, tensor.float

    def kept(x, args, kwargs) -> bool:
        return x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))

    monkeypatch.setattr(tensor, "to", lambda x, *args, **more: x if kept(x, args, more) else to(x, *args, **more))
    monkeypatch.setattr(tensor, "type", lambda x, *args, **more: x if kept(x, args, more) else kind(x, *args, **more))
    monkeypatch.setattr(tensor, "float", lambda x, **more: x if x.dtype == torch.float64 else single(x, **more))
    softmax_in_float64(monkeypatch)


@torch.no_grad()
def logits(model, ids, mask, steps=(), cache=None) -> torch.Tensor:
    """The logits of all tokens, which are read up to the end of one step after the other, or at once."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past, found = 0, []
    for end in (*steps, ids.shape[1]):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, past:end], CACHE: cache}
        found.append(model(ids[:, past:end], use_cache=cache is not None, **given).logits)
        past = end
    return torch.cat(found, 1)
