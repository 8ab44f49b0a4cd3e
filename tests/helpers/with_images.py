"""Tiny random multimodal models, and prompts with an image for them."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from hf_longctx.model.tiny import tiny_copy

# Sizes of the vision part that make an image a few tokens.
PARTS = {
    "mistral3": {"image_size": 28, "patch_size": 7},
    "llava": {"image_size": 28, "patch_size": 7},
    "internvl": {"image_size": (28, 28), "patch_size": (7, 7)},
    "llama4": {"image_size": 56, "patch_size": 14, "intermediate_size": 256},
    "qwen2_5_vl": {"window_size": 56},
    "gemma3": {"image_size": 28, "patch_size": 7},
}
# Models that are not told which tokens are an image's.
UNTYPED = ("mistral3", "llava", "internvl", "llama4")


def model_with_images(kind: str, dtype: torch.dtype = torch.float64, **text):
    """A tiny random multimodal model on eager attention, in eval mode; ``text``: attributes of its text config."""
    whole = AutoConfig.for_model(kind)
    config = tiny_copy(whole, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **text)
    for name, value in PARTS.get(kind, {}).items():
        setattr(config.vision_config, name, value)
    if kind == "llama4":  # what the pixel shuffle makes of four patches
        for name in ("projector_input_dim", "projector_output_dim", "vision_output_dim"):
            setattr(config.vision_config, name, 256)
    if kind == "gemma3":
        config.mm_tokens_per_image = 4
    if kind == "llava":
        config.vision_feature_layer = -1
    config.get_text_config()._experts_implementation = "eager"
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt_with_image(model, tokens: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
    """Input ids ``[1, tokens]`` with an image of a few tokens among them, and what the model takes beside them."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    vision = config.vision_config
    ids = torch.randint(3, 97, (1, tokens), generator=generator)
    if hasattr(vision, "temporal_patch_size"):
        grid = torch.tensor([[1, 4, 6]])
        pixels = 3 * vision.temporal_patch_size * vision.patch_size**2
        more = {"pixel_values": torch.randn(24, pixels, generator=generator, dtype=model.dtype), "image_grid_thw": grid}
        count, token = 6, config.image_token_id
    else:
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        more = {"pixel_values": torch.randn(1, 3, side, side, generator=generator, dtype=model.dtype)}
        count = {"llava": 16}.get(config.model_type, 4)
        token = getattr(config, "image_token_id", None) or config.image_token_index
    if config.model_type == "mistral3":
        more["image_sizes"] = torch.tensor([[28, 28]])
    ids[0, 8 : 8 + count] = token
    kind = "token_type_ids" if config.model_type == "gemma3" else "mm_token_type_ids"
    if config.model_type not in UNTYPED:
        more[kind] = (ids == token).int()
    return {"input_ids": ids, **more}
