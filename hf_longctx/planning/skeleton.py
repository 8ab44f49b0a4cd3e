"""A model without its weights: every module and parameter on the ``meta`` device, which takes no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def make_skeleton(dense: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Transformers config; the config itself is left alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(dense), dtype=dtype)
    model.tie_weights()  # Transformers 5.0 leaves that out on the meta device
    return model.eval()
