"""The registered attention function and mask function, and what they refuse.

Transformers calls ``attend`` in every attention layer with rotated q ``[B, H, T, D]`` and what the cache's ``update``
returned: a ``LayerKV`` of ours, or plain k, v ``[B, H_kv, S, D]`` of another cache or of none. Both give the same
answer, by the same visibility rule; plain tensors only save no memory.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..cache.layer_kv import NAME, NOT_OURS, LayerKV
from ..cache.paged.kv import PagedKV
from ..cache.plan import LayerPlan
from ..cache.seam import CACHE
from ..errors import UnsupportedModeError, UnsupportedModelError
from ..layout.dtypes import as_autocast, needs_grad
from ..layout.forward import Forward
from ..layout.scores import Scores
from .as_stock import StockMask, attend_as_stock, longctx_mask
from .layer_call import LayerCall

FORWARD = "longctx_forward"  # keyword argument by which the base model's pre-hook hands `Forward` to every layer

# Keyword arguments that reach the attention function beside its own. Those that mean nothing here, as they do in
# Transformers' own functions, or that the base model's pre-hook has read or refused; and those of the modules.
UNUSED = frozenset(
    ("cache_position", "ignore_index", "is_causal", "num_items_in_batch", "output_attentions", "output_hidden_states")
    + ("output_router_logits", "position_ids", "return_dict", "shift_labels", "token_type_ids", "use_cache")
    + ("tokenizer", "assistant_tokenizer")  # of generate(), which hands them on to the forward in 5.24
)
KNOWN = UNUSED | {"sliding_window", FORWARD}


def register() -> None:
    """Make the two functions known to Transformers under the name ``longctx``; patching and unpickling call this."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, longctx_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | LayerKV,
    value: Tensor | LayerKV,
    attention_mask: Tensor | StockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer: ``[B, T, H, D]`` contiguous, and no weights. A model without a patch runs as stock.

    Raises:
        UnsupportedModelError: the module asks for something that is not computed here, such as a softcap.
        UnsupportedModeError: the module alone was called, or added after patching; a 4D mask or dropout was given; a
            layer was run without the cache that the model was given.
    """
    plan: LayerPlan | None = getattr(module, "longctx_plan", None)
    traced = kwargs.get(FORWARD)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(traced, Tensor):  # the handle of a cache, in a compiled forward
        _check_call(module, plan, None, dropout, kwargs)
        return torch.ops.hf_longctx.decode_layer(query, key, value, traced, plan.layer_idx, scale), None
    if isinstance(key, PagedKV) and plan is not None:
        _check_call(module, plan, attention_mask, dropout, kwargs)
        return attend_step(plan, query, key, _scores(plan, scale, kwargs)), None
    call: Forward | None = key.forward if isinstance(key, LayerKV) else traced
    left_alone = getattr(module, "longctx_stock", False)
    if plan is None and (call is None or left_alone):
        kwargs.pop(FORWARD, None)
        more = {"scaling": scaling, "dropout": dropout, **kwargs}
        return attend_as_stock(module, query, key, value, attention_mask, patched=left_alone, **more)
    if plan is None or call is None:
        _refuse_place(module, call, kwargs)
    _check_call(module, plan, attention_mask, dropout, kwargs)
    if call.cached and not isinstance(key, LayerKV):
        raise UnsupportedModeError(
            f"layer {plan.layer_idx} was run without the LongCtxCache that the model was given, so nothing would be "
            "kept: something between the model and its layers takes the cache away, as gradient checkpointing does. "
            "Turn that off around generate(), or pass use_cache=False."
        )
    scores = _scores(plan, scale, kwargs)
    if isinstance(key, LayerKV):
        return attend_cached(plan, query, key, scores), None
    layer = LayerCall(plan, call, scores)
    query, key, value = as_autocast(query, key, value)
    out = layer.observed(query, key, value) if call.observer else None
    out = layer.plain(query, key, value) if out is None else out
    return out.transpose(1, 2).contiguous(), None


def attend_cached(plan: LayerPlan, query: Tensor, kv: LayerKV, scores: Scores) -> Tensor:
    """Attention ``[B, T, H, D]``, contiguous, of q ``[B, H, T, D]`` over what a LongCtxCache holds."""
    forward = kv.forward
    if kv.pending is not None and (out := kv.pending.attend(query, scores.scale, forward)) is not None:
        return out
    layer = LayerCall(plan, forward, scores)
    (query,) = as_autocast(query)
    out = layer.observed_cache(query, kv.parts) if forward.observer else None
    out = layer.cached(query, kv.parts) if out is None else out
    if forward.rows.past and needs_grad(out):
        out = _NoBackward.apply(out)
    return out.transpose(1, 2).contiguous()


def attend_step(plan: LayerPlan, query: Tensor, kv: PagedKV, scores: Scores) -> Tensor:
    """Attention ``[1, T, H, D]`` of the tokens of many requests, q ``[1, H, T, D]``: each as if it were alone.

    Requests that decode are the sequences of one batch.
    """
    step = kv.step
    rows = query[0].transpose(0, 1)  # [T, H, D]
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if step.decoded:
        own = LayerCall(plan, step.decoding, scores).cached(rows[step.columns][:, :, None], kv.decoded)
        out[step.columns] = own[:, :, 0]
    for request, forward, parts in zip(step.prompts, step.prompting, kv.prompts, strict=True):
        own = LayerCall(plan, forward, scores).cached(query[:, :, request.columns], parts)
        out[request.columns] = own[0].transpose(0, 1)
    return out[None]


def _scores(plan: LayerPlan, scale: float, kwargs: dict) -> Scores:
    """How scores are made, with what the family's record maps to a field of `Scores`."""
    return Scores(scale, **{field: kwargs.get(name) for name, field in plan.scores})


def _check_call(module: nn.Module, plan: LayerPlan, attention_mask: object, dropout: float, kwargs: dict) -> None:
    """Refuse what the module asks of its attention function and is not computed here."""
    _check_window(plan, attention_mask, kwargs.get("sliding_window"))
    if dropout:
        raise UnsupportedModeError(
            f"layer {plan.layer_idx} asks for dropout {dropout}, which patched attention lacks. Set attention_dropout "
            "to 0 in the config and the attention modules, or train dense: model.set_attn_implementation('sdpa')."
        )
    if not (attention_mask is None or isinstance(attention_mask, StockMask)):
        raise UnsupportedModeError(
            f"the model made a mask of shape {tuple(attention_mask.shape)} of its own for layer {plan.layer_idx}: it "
            "asks for more than causal attention over padded rows. Run it dense: model.set_attn_implementation('sdpa')."
        )
    if not kwargs.keys() <= KNOWN:
        _refuse_unknown(module, plan, kwargs)


def _check_window(plan: LayerPlan, attention_mask: object, told: int | None) -> None:
    """Refuse a window other than the plan's: ``told`` to the attention function, or in the mask alone."""
    shown = attention_mask.window if isinstance(attention_mask, StockMask) else told
    if told not in (None, plan.window) or (told is None and shown is None and plan.window is not None):
        raise UnsupportedModeError(
            f"layer {plan.layer_idx} has sliding_window={told} but was patched with {plan.window}. Call patch_model "
            "again after changing the model's config."
        )
    if shown != plan.window:
        raise UnsupportedModelError(
            f"layer {plan.layer_idx}: the model's mask shows a token the last {shown} tokens, but the record of this "
            f"model type says {plan.window}. Its file in patches/ must say which layers have a window (sliding); until "
            "it does, unpatch_model(model) runs the model dense."
        )


def _refuse_place(module: nn.Module, call: Forward | None, kwargs: dict) -> NoReturn:
    """Refuse an attention module that has no plan, or that was reached without the forward it belongs to."""
    name = type(module).__name__
    if call is None:
        raise UnsupportedModeError(
            f"{name} was reached without its base model's forward hooks. Call the model or its base model, as in "
            "model(...): an attention module alone, or .forward(...), does not know where the rows of the batch start."
        )
    if kwargs.get(FORWARD) is None:
        raise UnsupportedModeError(NOT_OURS)
    raise UnsupportedModeError(
        f"{name} was put into the model after patch_model and has no roles for its heads. Call patch_model once more."
    )


def _refuse_unknown(module: nn.Module, plan: LayerPlan, kwargs: dict) -> None:
    known = KNOWN | {name for name, _ in plan.scores}
    asked = sorted(name for name in kwargs.keys() - known if kwargs[name] is not None)
    if asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention function for {', '.join(asked)}, which patched attention does "
            "not compute: its answer would be wrong. This model cannot be patched; unpatch_model(model) runs it dense."
        )


class _NoBackward(torch.autograd.Function):
    """Identity whose backward refuses: what a cache kept carries no gradient, and a part of one would be wrong."""

    @staticmethod
    def forward(ctx, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise UnsupportedModeError(
            "gradients do not flow through the tokens a LongCtxCache kept. For training call the model with the whole "
            f"sequence and use_cache=False, or pass {CACHE}=DynamicCache()."
        )
