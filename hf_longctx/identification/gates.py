"""Gates between a head's two roles: the gated forward pass, its distance to the plain one, and the gates' state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, UnsupportedModelError
from ..io.atomic import written_whole
from ..io.work import check_settings
from ..model.modules import language_model
from ..model.observe import observe
from .methods.base import modes_kept

FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
SAVED = ("gates", "exp_avg", "exp_avg_sq", "losses")


def gated(gates: Tensor) -> Callable:
    """An observer by which every head's output is ``gate * retrieval + (1 - gate) * streaming``.

    Args:
        gates: ``[layers, KV heads]``; the query heads of a KV head share its gate.
    """

    def mix(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> Tensor:
        whole = compute("retrieval")
        streaming = compute("streaming")
        gate = gates[layer_idx].repeat_interleave(q.shape[1] // k.shape[1])[:, None, None].to(whole.device)
        # In the gates' float32 where the model is narrower: bfloat16 has 256 steps between 0.5 and 1.
        return (gate * whole + (1 - gate) * streaming).to(whole.dtype)

    return mix


def distance(model: nn.Module, gates: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Mean squared difference of the final hidden states at ``places`` between the gated and the plain model.

    Args:
        model: patched with all heads retrieval.
        gates: ``[layers, KV heads]``; the result is differentiable in them.
        ids: ``[1, T]``.
        places: positions ``[n]``.

    Returns:
        A scalar, float32 or wider.
    """
    base = language_model(model)
    with torch.no_grad():
        plain = base(ids, use_cache=False).last_hidden_state[0, places]
    with observe(model, gated(gates)):
        mixed = base(ids, use_cache=False).last_hidden_state[0, places]
    dtype = torch.promote_types(plain.dtype, torch.float32)
    return (mixed.to(dtype) - plain.to(dtype)).square().mean()


@contextmanager
def frozen(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Inside, no weight takes a gradient and no dropout runs; on exit everything is as before, also after an exception.

    Args:
        checkpointing: layers keep only their input and compute again in the backward pass.

    Raises:
        UnsupportedModelError: ``checkpointing``, and the model's layers cannot do it.
    """
    base = language_model(model)
    layers = [layer for layer in base.modules() if layer is not base and hasattr(layer, "gradient_checkpointing")]
    if checkpointing and not layers:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no layers with gradient checkpointing. Pass gradient_checkpointing=False."
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    flags = [(layer, {name: vars(layer)[name] for name in FLAGS if name in vars(layer)}) for layer in layers]
    try:
        with modes_kept(model):
            model.requires_grad_(False).eval()
            for layer in layers if checkpointing else ():
                # Transformers asks the layer itself whether it trains, so what is inside stays in eval mode. Its own
                # switch for the whole model would leave hooks on the embeddings behind.
                layer.training = layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            yield
    finally:
        for layer, own in flags:
            for name in FLAGS:
                vars(layer).pop(name, None)
            vars(layer).update(own)
        for weight in weights:
            weight.requires_grad_(True)


class Gates:
    """Gates in training.

    Attributes:
        values: ``[layers, KV heads]``, float32, in [0, 1].
        losses: distance to the plain model in every step done, float.
    """

    def __init__(self, layers: int, kv_heads: int, device: torch.device):
        self.values = torch.ones(layers, kv_heads, dtype=torch.float32, device=device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.values], weight_decay=0.0)
        self.losses: list[float] = []

    def step(self, grad: Tensor, loss: float, lr: float) -> None:
        """One step against ``grad``, and back into [0, 1]."""
        self.values.grad = grad
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.values.grad = None
        with torch.no_grad():
            self.values.clamp_(0, 1)
        self.losses.append(loss)

    def state(self) -> dict[str, Tensor]:
        """What training goes on from, on the CPU."""
        moments = self.optimizer.state[self.values]
        losses = torch.tensor(self.losses, dtype=torch.float64)
        tensors = (self.values.detach(), moments["exp_avg"], moments["exp_avg_sq"], losses)
        return {name: tensor.cpu().contiguous() for name, tensor in zip(SAVED, tensors, strict=True)}

    def go_on_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        self.losses = state["losses"].tolist()
        with torch.no_grad():
            self.values.copy_(state["gates"])
        moments = {"step": torch.tensor(float(len(self.losses)))}
        moments |= {name: state[name].to(self.values.device) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": {0: moments}})


def save(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write a state whole or not at all: a run that is cut off leaves the file of before."""
    with written_whole(path) as unfinished:
        save_file(dict(state), unfinished, metadata={"settings": json.dumps(settings)})


def load(path: Path, settings: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The state that ``save`` wrote, or None where there is no file.

    Raises:
        ConfigError: the file is something else, or was written under other settings.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = dict(json.loads(file.metadata()["settings"]))
            state = {name: file.get_tensor(name) for name in SAVED}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"work: {path} is no state of a duo_gates run ({error}). Remove it, or give another folder."
        ) from None
    check_settings(path, told, settings)
    return state
