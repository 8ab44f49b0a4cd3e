"""A model without its weights: every module and parameter on the ``meta`` device, which takes no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..config.model import text_config


def make_skeleton(dense: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Transformers config, all of it where it is multimodal; the config itself is left alone."""
    autos = [AutoModelForCausalLM, AutoModel]
    if text_config(dense) is not dense:
        autos.insert(0, AutoModelForImageTextToText)
    auto = next((one for one in autos if type(dense) in one._model_mapping), AutoModelForCausalLM)
    with torch.device("meta"):
        model = auto.from_config(copy.deepcopy(dense), dtype=dtype)
    model.tie_weights()  # Transformers 5.0 leaves that out on the meta device
    return model.eval()
