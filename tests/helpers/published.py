"""The checkpoints of examples/published_heads, as Transformers builds them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "published_heads"
LISTED = {entry["name"]: entry for entry in yaml.safe_load((DATA / "checkpoints.yaml").read_text("utf-8"))}
# Of the model types that this Transformers has.
ENTRIES = {name: entry for name, entry in LISTED.items() if entry["config"]["model_type"] in CONFIG_MAPPING}


def hf_config(name: str, **changes):
    return AutoConfig.for_model(**copy.deepcopy({**ENTRIES[name]["config"], **changes}))


@functools.cache
def model_of(name: str):
    """A model of the checkpoint's class and sizes without memory, from the table alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config(name))
