"""Where things are in a loaded model: inside of wrappers, in its layers, and over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .family import Family
from .state import PatchState


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside PEFT and torch.compile wrappers.

    Raises:
        UnsupportedModelError: there is none.
    """
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = inner.module
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no Transformers model. Give the model itself, not a pipeline or a tokenizer; "
            "`hf-longctx configs models` lists the model types that work."
        )
    return inner


def language_model(model: nn.Module) -> PreTrainedModel:
    """The base model that reads the text: ``model.base_model``, or the one inside of a multimodal model.

    Raises:
        UnsupportedModelError: this is no Transformers model.
    """
    inner = unwrap(model)
    decoder = inner.get_decoder()
    base = (decoder if isinstance(decoder, PreTrainedModel) else inner).base_model
    # Llama 4's model with a head has another base_model_prefix than the attribute that holds its base model.
    within = getattr(base, "model", None)
    return within if isinstance(within, PreTrainedModel) else base


def name_of(model: nn.Module) -> str:
    """What the model was loaded from: a hub id or a folder; empty where that is not known."""
    inner = unwrap(model)
    given = [getattr(config, "_name_or_path", None) for config in (inner.config, language_model(model).config)]
    return next((name for name in given if name), "")


def state_of(model: nn.Module) -> PatchState | None:
    """What a patched model remembers; None for a model that is not patched."""
    return getattr(language_model(model), "longctx_state", None)


def attention_modules(base: nn.Module, family: Family) -> list[nn.Module]:
    """The attention modules of the base model, by layer index; a layer without attention has none."""
    layers = getattr(base, family.layers, None)
    modules = [getattr(layer, family.attention) for layer in layers or () if hasattr(layer, family.attention)]
    wrapper = next((type(module).__name__ for module in modules if not hasattr(module, "layer_idx")), None)
    if wrapper is not None:
        raise UnsupportedModelError(
            f"'{family.layers}[i].{family.attention}' is a {wrapper}, which has no layer_idx: something was put around "
            "the attention, as PEFT's adaption prompt does. Call patch_model first, and wrap the patched model."
        )
    if not modules:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no '{family.layers}[i].{family.attention}', where {family.model_type} models "
            "keep their attention."
        )
    return modules


def attention_copies(module: nn.Module, family: Family) -> list[nn.Module]:
    """The attention module itself, or the copies inside PEFT's modules_to_save, each of which has its own config.

    Raises:
        UnsupportedModelError: it has no projection of the name that the family says.
    """
    found = [part for part in module.modules() if family.key_projection in part._modules]
    if not found:
        names = ", ".join(module._modules) or "none"
        raise UnsupportedModelError(
            f"{type(module).__name__} has no '{family.key_projection}'; it has {names}. Set key_projection in "
            f"patches/{family.model_type}.py to the one that makes the keys."
        )
    return found


def tensor_parallel(module: nn.Module, family: Family, kv_heads: int) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group over which this attention's KV heads are spread; (0, 1) for none.

    Raises:
        UnsupportedModelError: a process would hold a part of a KV head.
    """
    projection = getattr(module, family.key_projection)
    weight = getattr(projection, "weight", None)
    # Transformers keeps the global shape in a DTensor, or (5.2 to 5.12) the local one and the mesh on the projection.
    mesh = getattr(weight, "device_mesh", None) or getattr(projection, "_hf_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if mesh is None or (names and "tp" not in names):  # FSDP spreads weights alone: every process has all heads
        return 0, 1
    mesh = mesh["tp"] if names else mesh
    every = weight.shape[0] if hasattr(weight, "to_local") else kv_heads * module.head_dim
    made = _outputs(projection, weight, getattr(module.config, "dtype", None))
    if made >= every:
        return 0, 1
    size = mesh.size()
    if kv_heads % size or made * size != every:
        raise UnsupportedModelError(
            f"{kv_heads} KV heads cannot be spread over {size} processes, each of which must hold whole ones. Load the "
            "model with a tp_size that divides their number."
        )
    return mesh.get_local_rank(), size


@torch.no_grad()
def _outputs(projection: nn.Module, weight: Tensor, dtype: torch.dtype | None) -> int:
    """The numbers that a projection gives this process for a token: those of its own weight, or gathered from all.

    One token of zeros is run, since a plan of the program's own may say which; all processes patch at once.

    Args:
        dtype: what a quantised weight computes in.
    """
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if local.is_floating_point() and local.element_size() > 1:
        dtype = local.dtype
    width = getattr(projection, "in_features", weight.shape[-1])
    return projection(torch.zeros(1, 1, width, dtype=dtype or torch.bfloat16, device=local.device)).shape[-1]
