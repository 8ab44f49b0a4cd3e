"""The registered attention function and mask function: role by role, each head reads what its store kept.

Transformers calls ``attend`` in every attention layer with rotated q ``[B, H, T, D]`` and what the cache's ``update``
returned: a ``LayerKV`` of ours, or plain k, v ``[B, H_kv, S, D]`` of another cache or of none. Both give the same
answer, by the same visibility rule; plain tensors only save no memory.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from ..cache.layer import NAME, NOT_OURS, LayerKV
from ..cache.plan import LayerPlan, PrefillPlan
from ..cache.seam import CACHE
from ..errors import UnsupportedModeError, UnsupportedModelError
from ..kernels import base as dispatch
from ..layout.dtypes import as_autocast, needs_grad
from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Segment
from ..prefill.base import select
from ..stores.base import StoreSpec
from .as_stock import StockMask, attend_as_stock, longctx_mask

ROWS = "longctx_rows"  # keyword argument by which the base model's pre-hook hands Rows to every layer

# Keyword arguments that reach the attention function beside its own. Those that mean nothing here, as they do in
# Transformers' own functions, or that the base model's pre-hook has read or refused; and those of the modules.
UNUSED = frozenset(
    ("cache_position", "ignore_index", "is_causal", "num_items_in_batch", "output_attentions", "output_hidden_states")
    + ("output_router_logits", "position_ids", "return_dict", "shift_labels", "token_type_ids", "use_cache")
)
KNOWN = UNUSED | {"sliding_window", ROWS}


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
    rows: Rows | None = key.rows if isinstance(key, LayerKV) else kwargs.get(ROWS)
    if plan is None and rows is None:
        more = {"scaling": scaling, "dropout": dropout, **kwargs}
        return attend_as_stock(module, query, key, value, attention_mask, **more)
    _check_place(module, plan, rows, kwargs)
    window = plan.stores["streaming"].recent if plan.sliding else None
    if kwargs.get("sliding_window") != window:
        raise UnsupportedModeError(
            f"layer {plan.layer_idx} has sliding_window={kwargs.get('sliding_window')} but was patched with {window}. "
            "Call patch_model again after changing the model's config."
        )
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
        _refuse_unknown(module, kwargs)
    if rows.cached and not isinstance(key, LayerKV):
        raise UnsupportedModeError(
            f"layer {plan.layer_idx} was run without the LongCtxCache that the model was given, so nothing would be "
            "kept: something between the model and its layers takes the cache away, as gradient checkpointing does. "
            "Turn that off around generate(), or pass use_cache=False."
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = LayerCall(plan, rows, scale)
    (query,) = as_autocast(query)
    if isinstance(key, LayerKV):
        out = call.kept(query, key.heads)
        if rows.past and needs_grad(out):
            out = _NoBackward.apply(out)
    else:
        key, value = as_autocast(key, value)
        out = call.observed(query, key, value) if rows.observer else None
        out = call.plain(query, key, value) if out is None else out
    return out.transpose(1, 2).contiguous(), None


def _check_place(module: nn.Module, plan: LayerPlan | None, rows: Rows | None, kwargs: dict) -> None:
    """Refuse an attention module that has no plan, or that was reached without the forward it belongs to."""
    if plan is not None and rows is not None:
        return
    name = type(module).__name__
    if rows is None:
        raise UnsupportedModeError(
            f"{name} was reached without its base model's forward hooks. Call the model or its base model, as in "
            "model(...): an attention module alone, or .forward(...), does not know where the rows of the batch start."
        )
    if kwargs.get(ROWS) is None:
        raise UnsupportedModeError(NOT_OURS)
    raise UnsupportedModeError(
        f"{name} was put into the model after patch_model and has no roles for its heads. Call patch_model once more."
    )


def _refuse_unknown(module: nn.Module, given: dict) -> None:
    asked = sorted(name for name in given.keys() - KNOWN if given[name] is not None)
    if asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention function for {', '.join(asked)}, which patched attention does "
            "not compute: its answer would be wrong. This model cannot be patched; unpatch_model(model) runs it dense."
        )


class LayerCall:
    """One layer's attention in one forward."""

    def __init__(self, plan: LayerPlan, rows: Rows, scale: float):
        self.plan, self.rows, self.scale = plan, rows, scale

    def kernel(self, query: Tensor, *keys: Tensor, function: str | None = None):
        """The kernel for this call; ``auto`` where Transformers' own call (``stock``) cannot be made.

        A function that is not differentiable in every kernel needs the ``keys`` and values too.
        """
        kernel = dispatch.pick(
            "auto" if self.plan.kernel == "stock" else self.plan.kernel,
            device=query.device,
            dtype=query.dtype,
            head_dim=query.shape[-1],
            needs_grad=needs_grad(query, *keys),
            function=function,
        )
        self.rows.used.add(kernel.NAME)
        return kernel

    def kept(self, query: Tensor, parts: list[HeadKV]) -> Tensor:
        """Attention ``[B, H, T, D]`` over what a LongCtxCache kept."""
        group = query.shape[1] // parts[0].heads.total
        dtype, outs = query.dtype, []
        if (layer := self._in_one_call(query, parts)) is not None:
            return layer.to(dtype)
        for part in parts:
            # A cache filled in another dtype (autocast, model.to) is read in its own.
            q = part.heads.take(query, group).to(part.dtype)
            prefill = self._prefill(part)
            if prefill is None and self._stock(part):
                outs.append(self._sdpa(q, *part.segments[0].kept()))
            elif self.rows.new == 1:
                outs.append(part.store.decode(self, q, part))
            else:
                outs.append(self._rowwise(q, part, prefill))
        return join([part.heads for part in parts], outs, group).to(dtype)

    def _in_one_call(self, query: Tensor, parts: list[HeadKV]) -> Tensor | None:
        """One decoded token by a kernel that has `decode_layer`, all roles at once; None where it is role by role."""
        dtypes = {part.dtype for part in parts}  # two, where autocast was on while one of them grew
        plain = all(isinstance(segment, Segment) for part in parts for segment in part.segments)
        if self.rows.new > 1 or len(dtypes) > 1 or not plain or any(map(self._stock, parts)):
            return None
        query = query.to(*dtypes)
        kernel = self.kernel(query)
        return kernel.decode_layer(query, parts, self.scale) if hasattr(kernel, "decode_layer") else None

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same attention over the keys and values ``[B, H_kv, S, D]`` of all tokens."""
        parts = [self._all_tokens(heads, self.plan.stores[heads.role], key, value) for heads in self.plan.heads]
        group = query.shape[1] // key.shape[1]
        outs = []
        for part in parts:
            q = part.heads.take(query, group)
            prefill = self._prefill(part)
            stock = prefill is None and self._stock(part)
            outs.append(self._sdpa(q, *part.segments[0].kept()) if stock else self._rowwise(q, part, prefill))
        return join([part.heads for part in parts], outs, group)

    def observed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Show this layer to the observer; its answer replaces the layer's output. No pattern runs in ``compute``."""
        total = key.shape[1]

        def compute(role: str) -> Tensor:
            heads = RoleHeads(role, tuple(range(total)), total)
            return self._rowwise(query, self._all_tokens(heads, self.plan.stores[role], key, value))

        return self.rows.observer(self.plan.layer_idx, query, key, value, self.scale, self.rows, compute)

    def _all_tokens(self, heads: RoleHeads, store: StoreSpec, key: Tensor, value: Tensor) -> HeadKV:
        """Another cache's keys; Transformers' own sliding layers give the last ones only, all others every token."""
        first = self.rows.total - key.shape[2]
        if first and not (self.plan.sliding and first > 0):
            raise UnsupportedModeError(
                f"layer {self.plan.layer_idx} was given {key.shape[2]} keys for {self.rows.total} tokens. A patched "
                "model takes LongCtxCache, DynamicCache, or no cache."
            )
        return HeadKV(heads, [Segment(heads.take(key), heads.take(value), key.shape[2])], store, first=first)

    def _stock(self, part: HeadKV) -> bool:
        one = len(part.segments) == 1 and isinstance(part.segments[0], Segment) and part.segments[0].bias is None
        return self.plan.kernel == "stock" and one and part.store.span() is None and not self.rows.padded

    def _prefill(self, part: HeadKV) -> PrefillPlan | None:
        """The patterns of these heads, if they run for some row; counts the rows for which they do not."""
        plan = self.plan.prefill
        if plan is None or part.heads.role != "retrieval" or self.rows.new == 1:
            return None
        runs = [plan.runs(*real) for row in range(self.rows.batch) if (real := self.rows.real(row))[0]]
        self.rows.prefill.dense += runs.count(False)
        return plan if any(runs) else None

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Transformers' own call, in pieces of 512 queries where a cached prefix needs a mask."""
        total, new = k.shape[2], q.shape[2]
        self.rows.used.add("stock")
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
        if new in (1, total):
            return sdpa_attention_forward(module, q, k, v, None, scaling=self.scale)[0].transpose(1, 2)
        slots, outs = torch.arange(total, device=q.device), []
        for piece in range(0, new, 512):
            queries = slots[total - new + piece : min(total, total - new + piece + 512)]
            mask = (slots <= queries[:, None])[None, None]
            part = q[:, :, piece : piece + 512]
            outs.append(sdpa_attention_forward(module, part, k, v, mask, scaling=self.scale)[0])
        return torch.cat(outs, 1).transpose(1, 2)

    def _rowwise(self, q: Tensor, part: HeadKV, prefill: PrefillPlan | None = None) -> Tensor:
        """Rows of one start at a time, each as if it were alone; the outputs of left pads are zeros."""
        outs = []
        for group, start in self.rows.groups(by_end=prefill is not None):
            pads = min(max(0, start - self.rows.past), self.rows.new)
            alone, real = q[group, :, pads:], self.rows.real(group.start or 0)
            if not alone.shape[2]:
                out = torch.zeros_like(alone)
            elif prefill is not None and prefill.runs(*real):
                out = self._sparse(alone, part.alone(group, start), prefill, *real)
            else:
                out = part.store.prefill(self, alone, part, group, start)
            outs.append(nn.functional.pad(out, (0, 0, pads, 0)) if pads else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _sparse(self, q: Tensor, segments: list[Segment], prefill: PrefillPlan, brought: int, seen: int) -> Tensor:
        """What the patterns read, ``[B, H, T, D]``: the first ``brought`` queries are real, the rest right pads."""
        if any(segment.bias is not None for segment in segments):
            raise UnsupportedModeError(
                f"layer {self.plan.layer_idx}: the store of the retrieval heads gives keys a score bias, among which a "
                "prefill pattern cannot choose. Set prefill.retrieval to {pattern: dense}."
            )
        kept = [segment.kept() for segment in segments]
        k, v = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*kept, strict=True))
        pads, q, k, v = q.shape[2] - brought, q[:, :, :brought], k[:, :, :seen], v[:, :, :seen]
        blocks = select(prefill.patterns, q, k, self.scale)
        reads, causal, group = blocks.reads, blocks.causal, q.shape[1] // k.shape[1]
        if prefill.share_groups:
            blocks = blocks.share_groups(group)
            self.rows.prefill.add(blocks.reads * group, reads, causal, q.shape[0])
        else:
            self.rows.prefill.add(reads, reads, causal, q.shape[0])
        kernel = self.kernel(q, k, v, function="sparse_prefill")
        if kernel.NAME == "reference" and self.plan.kernel != "reference":
            why = "with gradients" if needs_grad(q, k, v) else f"in {q.dtype} on {q.device.type}"
            self.rows.notes.add(
                f"sparse prefill: ran by its slow definition (kernel reference), no faster kernel computes it {why}"
            )
        out = kernel.sparse_prefill(q, k, v, blocks, self.scale)
        return nn.functional.pad(out, (0, 0, 0, pads)) if pads else out


def join(heads: list[RoleHeads], outs: list[Tensor], group: int) -> Tensor:
    """The outputs of the roles ``[B, n * group, T, D]`` put back into the order of the layer's heads."""
    if len(outs) == 1:
        return outs[0]
    pieces = []
    for part, out in zip(heads, outs, strict=True):
        done = 0
        for a, b in part.runs:
            pieces.append((a, out[:, done * group : (done + b - a) * group]))
            done += b - a
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])], 1)


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
