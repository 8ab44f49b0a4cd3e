"""``bench gpu``: the kernels on a CUDA device, against the best dense attention there is on it. One layer's attention.

Shapes: ``B`` batch (1), ``H`` query heads, ``n`` KV heads, ``T`` query tokens, ``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..cache.cache import LongCtxCache
from ..errors import LongCtxError, UnsupportedModeError
from ..kernels import base as dispatch
from ..kernels import cpu, flash, reference
from ..layout.blocks import BlockList
from ..layout.reads import ALL, CAUSAL, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment
from ..model.patch import patch_model
from .block_lists import name_of, random_list
from .columns import Column, check_same, dtype_of, kept_buffers, make_model, patch, random_heads
from .gpu_clock import Clock, DeviceClock, bandwidth
from .gpu_settings import GpuSettings
from .measure import Samples, Told, quiet, turns

CHECKED = 64  # queries, spread over the prompt, whose answer is checked
DENSE = "dense"
STREAMING = "streaming"


@dataclass(frozen=True)
class Way:
    """One way to compute a case.

    Attributes:
        work: the call, which gives ``[B, H, T, D]``.
        reads: which keys its queries read, a key of the case's answers.
        density: share of them of all causal keys (prompts), or of the bytes of all keys (decoding).
        kernel: the word of a kernel of ours; None for the dense attention that is to be beaten.
        kept_bytes: keys and values that it reads, in decoding.
    """

    work: Callable[[], Tensor]
    reads: str = DENSE
    density: float = 1.0
    kernel: str | None = None
    kept_bytes: int | None = None


def bench(settings: GpuSettings, told: Told = quiet) -> tuple[list[dict], float]:
    """The results of `run` on the first CUDA device, and its bandwidth in GB/s.

    Raises:
        UnsupportedModeError: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedModeError(
            "bench gpu needs a CUDA device, and torch sees none. hf-longctx bench decode, prefill and e2e measure the "
            "processor."
        )
    device = torch.device("cuda")
    clock = DeviceClock(device)
    gb_per_s = bandwidth(clock, clock.buffer)
    return run(settings, device, clock, told), gb_per_s


@torch.no_grad()
def run(settings: GpuSettings, device: torch.device, clock: Clock, told: Told = quiet) -> list[dict]:
    """One result per dtype, case and length; ``columns`` holds figures and every raw time.

    Raises:
        LongCtxError: a kernel is wrong, nothing dense could be measured, or a length does not fit on the device.
    """
    results = []
    for word in settings.dtypes:
        for case, lengths in ((_prefill, settings.tokens), (_decode, settings.decode_tokens)):
            for tokens in lengths:
                try:
                    results.append(case(settings, word, tokens, device, clock, told))
                except torch.OutOfMemoryError as error:
                    raise LongCtxError(
                        f"{tokens} tokens do not fit on the device ({error}). Name shorter ones with --tokens and "
                        "--decode-tokens."
                    ) from error
    return results


def _prefill(settings: GpuSettings, word: str, tokens: int, device: torch.device, clock: Clock, told: Told) -> dict:
    """A whole prompt at once: dense, by block lists, and over sinks and a window."""
    scale = settings.head_dim**-0.5
    sink = settings.sink
    with torch.device(device):
        torch.manual_seed(settings.seed)
        q, k, v = (
            random_heads(n, tokens, settings, dtype_of(word)) for n in (settings.heads, *[settings.kv_heads] * 2)
        )
        at = torch.linspace(0, tokens - 1, min(CHECKED, tokens)).long()
        keys = torch.arange(tokens)
    ways = _dense(q, k, v, scale)
    missing = {}
    age = at[:, None] - keys
    visible = {DENSE: age >= 0, STREAMING: (age >= 0) & ((keys < sink) | (age < settings.recent))}
    whole = [Segment(k, v, tokens)]
    parts = [Segment(k[:, :, part], v[:, :, part], len(keys[part])) for part in (slice(sink), slice(sink, None))]
    window = Window(settings.recent, min(sink, tokens))
    full = min(tokens, sink + settings.recent)
    density = (full * (full + 1) // 2 + (tokens - full) * full) / (tokens * (tokens + 1) // 2)
    for name, kernel in _kernels(settings, q, parts, window, "streaming_prefill", missing):
        work = partial(_attention, kernel, q, parts, window, scale)
        ways[f"{name} {STREAMING}"] = Way(work, STREAMING, density, name)
    for percent in settings.densities:
        made = _on(device, random_list(tokens, settings.heads, percent / 100, settings.seed))
        visible[name_of(percent)] = torch.cat([made.visible(i, i + 1) for i in at.tolist()], 2)
        for name, kernel in _kernels(settings, q, whole, made, "sparse_prefill", missing):
            work = partial(_attention, kernel, q, whole, made, scale)
            ways[f"{name} {name_of(percent)}"] = Way(work, name_of(percent), made.density, name)
    want = {reads: _answer(q[:, :, at], k, v, mask, scale) for reads, mask in visible.items()}
    del visible
    return {
        "case": "prefill",
        "dtype": word,
        "tokens": tokens,
        **_measure(settings, word, ways, want, at, clock, missing, tokens, told),
    }


def _decode(settings: GpuSettings, word: str, tokens: int, device: torch.device, clock: Clock, told: Told) -> dict:
    """One token over caches filled with random keys, through the attention that a patched model calls."""
    dtype = dtype_of(word)
    counts = (settings.heads, settings.kv_heads, settings.kv_heads)
    with torch.device(device):
        torch.manual_seed(settings.seed)
        prompt = [random_heads(n, tokens, settings, dtype) for n in counts[1:]]
        q, *token = (random_heads(n, 1, settings, dtype) for n in counts)
    kept = {}
    for percent in (100, *settings.retrieval):
        column = _column(settings, dtype, percent, "auto")
        column.update(0, *prompt)
        kept[percent] = column.update(0, *token)
    del prompt
    k, v = kept_buffers(kept[100])
    scale = settings.head_dim**-0.5
    missing = {}
    sizes = {percent: _bytes(one) for percent, one in kept.items()}
    ways = {name: replace(way, kept_bytes=sizes[100]) for name, way in _dense(q, k, v, scale).items()}
    for name, _ in _kernels(settings, q, [Segment(k, v, k.shape[2])], ALL, "decode", missing):
        for percent in kept:
            work = partial(_attend, _column(settings, dtype, percent, name), q, kept[percent])
            way = Way(work, str(percent), sizes[percent] / sizes[100], name, sizes[percent])
            ways[f"{name} {percent}% retrieval"] = way
    keys = torch.arange(k.shape[2], device=device)
    streams = (keys < settings.sink) | (keys >= k.shape[2] - settings.recent)
    want = {}
    for percent in kept:
        whole = torch.tensor([letter == "R" for letter in settings.roles(percent)[0]], device=device)
        visible = whole.repeat_interleave(settings.heads // settings.kv_heads)[None, :, None, None] | streams
        want[str(percent)] = _answer(q, k, v, visible, scale)
    want[DENSE], at = want["100"], torch.zeros(1, dtype=torch.long, device=device)
    return {
        "case": "decode",
        "dtype": word,
        "tokens": tokens,
        **_measure(settings, word, ways, want, at, clock, missing, tokens, told),
    }


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Way]:
    """The dense attention that may be found on a device, of a whole prompt or of one token."""
    causal = q.shape[2] > 1

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

    def folded() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
            return _attention(cpu, q, [Segment(k, v, k.shape[2])], ALL, scale)

    def flash_attn() -> Tensor:
        return _attention(flash, q, [Segment(k, v, k.shape[2])], CAUSAL, scale)

    works = {
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash-attn": flash_attn,
    }
    if not causal:
        works["SDPA flash, group folded"] = folded
    return {name: Way(work) for name, work in works.items()}


def _attention(kernel: ModuleType, q: Tensor, segments: Sequence[Segment], reads: Reads, scale: float) -> Tensor:
    return kernel.attend(q, segments, reads, Scores(scale), False)[0]


def _kernels(
    settings: GpuSettings, q: Tensor, segments: Sequence[Segment], reads: Reads, what: str, missing: dict[str, str]
) -> Iterator[tuple[str, ModuleType]]:
    """The kernels to measure that compute this here; why the others do not goes to ``missing``, under ``what``."""
    scale = settings.head_dim**-0.5
    for word in settings.kernels:
        try:
            yield word, dispatch.pick(word, dispatch.case_of(q, segments, reads, Scores(scale)))
        except UnsupportedModeError as error:
            missing[f"{word} {what}"] = str(error).partition(" Use kernel")[0]


def _column(settings: GpuSettings, dtype: torch.dtype, percent: int, kernel: str) -> Column:
    model = patch(make_model(settings, dtype, "meta"), settings, settings.roles(percent))
    patch_model(model, "auto", kernel=kernel)  # the config that the model has now, by another kernel
    return Column(model, LongCtxCache(model))


def _attend(column: Column, q: Tensor, kept: tuple) -> Tensor:
    return column.attend(0, q, kept).transpose(1, 2)


def _bytes(kept: tuple) -> int:
    return sum(part.numel() * part.element_size() for part in kept_buffers(kept))


def _on(device: torch.device, made: BlockList) -> BlockList:
    names = ("indices", "counts", "columns", "column_counts")
    return replace(made, **{name: getattr(made, name).to(device) for name in names})


def _answer(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`reference.attention` in float32, KV head by KV head, so that no copy of all keys is made."""
    group = q.shape[1] // k.shape[1]
    visible = visible.expand(1, q.shape[1], -1, -1)
    outs = []
    for head in range(k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        one = slice(head, head + 1)
        outs.append(reference.attention(q[:, own].float(), k[:, one], v[:, one], visible[:, own], scale)[0])
    return torch.cat(outs, 1)


def _measure(
    settings: GpuSettings,
    word: str,
    ways: dict[str, Way],
    want: dict[str, Tensor],
    at: Tensor,
    clock: Clock,
    missing: dict[str, str],
    tokens: int,
    told: Told,
) -> dict:
    """Check every way, then time those that this device has, in turns."""
    error = 0.0
    found = {}
    for name, way in ways.items():
        try:
            got = way.work()[:, :, at].float()
        except RuntimeError as refusal:
            if way.kernel is not None or isinstance(refusal, torch.OutOfMemoryError):
                raise
            missing[name] = str(refusal).partition("\n")[0]
            continue
        # Query by query: one that reads many keys gives numbers far below those of one that reads few.
        size = want[way.reads].abs().amax(-1, keepdim=True).clamp_min(1e-30)
        error = max(error, check_same(f"the output of {name}", got / size, want[way.reads] / size, word))
        found[name] = way
    dense = [name for name, way in found.items() if way.kernel is None]
    if not dense:
        raise LongCtxError(f"no dense attention could be measured here: {missing}. Please report this.")
    samples = {name: Samples() for name in found}
    for _, name in turns(found, settings.rounds, tokens, told):
        samples[name].ms.append(clock(found[name].work))
    figures = {name: _figures(way, samples[name]) for name, way in found.items()}
    best = min(dense, key=lambda name: samples[name].median)
    return {"error": error, "best_dense": best, "columns": figures, "not_measured": missing}


def _figures(way: Way, samples: Samples) -> dict:
    figures = {"ms": samples.as_dict(), "kernel": way.kernel, "reads": way.reads, "density": way.density}
    if way.kept_bytes is not None:
        figures |= {"kept_bytes": way.kept_bytes, "gb_per_s": way.kept_bytes / samples.median / 1e6}
    return figures
