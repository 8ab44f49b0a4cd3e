"""Block lists by FlexAttention (arXiv:2412.05496): one compiled kernel for every list and every length.

The first call of a group size, dtype, head_dim, block size or scale compiles for seconds to a minute; new lists and new
lengths then run what was compiled. Written for the CPU; it takes CUDA devices
too, for which `triton.py` is the kernel made for lists.

A KV head of a row is one call. Its keys are padded to whole blocks, and behind them stand, list by list, copies of the
columns: compiled for the CPU, FlexAttention gives no logsumexp by which two calls could be joined. For a query block,
its own block and the columns are partial blocks, under a mask; every other listed block is read whole.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``G = H // n``, ``T`` query tokens, ``S`` key tokens, ``D``
head_dim, ``L`` lists per KV head (G, or 1 where its query heads share one), ``NQ`` query blocks.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.reads import Reads
from ..layout.scores import Scores
from ..layout.segments import Segment, joined
from . import _nvidia, cpu, reference
from ._arguments import PLAIN, check, check_reads
from .base import Case, case_of

NAME = "flex"
# Below the definition, which needs no compiler: `auto` never takes it.
PREFERENCE = -1
READS = frozenset({BlockList})

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = 64  # compiled kernels of a process; beyond that torch raises, where without fullgraph it would run densely


def supports(case: Case) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if case.device.type not in ("cpu", "cuda"):
        return f"is compiled for the CPU and for CUDA, not for {case.device.type}"
    if case.dtype not in DTYPES:
        return f"takes {', '.join(map(str, DTYPES))}, not {case.dtype}"
    if case.head_dim < 16 or case.head_dim & (case.head_dim - 1):
        return f"takes a head_dim that is a power of two from 16 on, not {case.head_dim}"
    if case.needs_grad:
        return "computes no gradients"
    if case.kinds:
        return PLAIN
    if case.softcap or case.first_bias:
        return "computes neither a softcap nor a bias of the first token"
    return _missing(case.device)


def _missing(device: torch.device) -> str | None:
    """What this machine lacks."""
    on_cuda = device.type == "cuda"
    missing = _nvidia.refusal(device, False) or _nvidia.no_triton(device) if on_cuda else _no_compiler()
    if missing is None and not _torch_has_it():
        missing = f"torch {torch.__version__} has no BlockMask.from_kv_blocks for inference"
    return missing


def attend(
    q: Tensor, segments: Sequence[Segment], reads: Reads, scores: Scores, want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention over a block list, as `base` says: out ``[B, H, T, D_v]``; there is no lse where it is not wanted."""
    check_reads(NAME, READS, reads)
    if (reason := supports(case_of(q, segments, reads, scores))) is not None:
        raise UnsupportedModeError(f"kernel flex {reason}. Use kernel: cpu or reference.")
    if want_lse:
        return (cpu if q.device.type == "cpu" else reference).attend(q, segments, reads, scores)
    check(NAME, q, segments, reads, scores)
    return _listed(q, *joined(segments), reads, scores.scale), None


def _no_compiler() -> str | None:
    """What this machine lacks to compile for the CPU."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler, and {compiler} is not found: install one or name it in CXX"
    vectors = torch.backends.cpu.get_cpu_capability()
    return None if vectors.startswith("AVX") else f"needs a CPU with AVX2, which torch does not see here ({vectors})"


@cache
def _torch_has_it() -> bool:
    """Whether a block mask can be made from indices alone, without its transpose."""
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        return False
    return "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters


def _listed(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` over k, v ``[B, n, S, D]``."""
    (batch, heads, q_len, _), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    lists = blocks.counts.shape[1] // kv_heads
    out = torch.zeros_like(q)
    if not q.numel():
        return out
    before = blocks.first % blocks.block  # of the first query block, queries that earlier chunks brought
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for row in range(batch):
            for head in range(kv_heads):
                mine = slice(head * group, (head + 1) * group)
                listed = slice(head * lists, (head + 1) * lists)
                names = ("indices", "counts", "columns", "column_counts")
                own = replace(blocks, **{name: getattr(blocks, name)[row : row + 1, listed] for name in names})
                made = _read(q[row : row + 1, mine], *(t[row : row + 1, head : head + 1] for t in (k, v)), own, scale)
                out[row, mine] = made[0, :, before : before + q_len]
    return out


def _read(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """`attend` of one KV head, ``[1, G, >= NQ * block, D]``: with the queries that whole blocks add."""
    size = blocks.block
    group = q.shape[1]
    query_blocks = blocks.counts.shape[2]
    # Sizes of one would be compiled for themselves.
    query_rows, key_rows = (max(2, count) * size for count in (query_blocks, blocks.key_blocks))
    before = blocks.first % size
    q = pad(q, (0, 0, before, query_rows - before - q.shape[2])).contiguous()
    columns = blocks.columns[0].long()
    column_blocks = -(-blocks.columns.shape[2] // size)
    keys, values = (_extended(t, columns, key_rows, column_blocks * size) for t in (k, v))
    hidden, seen = _columns(blocks, columns, max(1, column_blocks) * size)
    partial, listed, nothing = _partial_and_full(blocks, seen, key_rows // size, column_blocks)
    masks = [t.expand(group, *t.shape[1:])[None] for t in (*partial, *listed)]
    masks = [pad(t, (0, 0) * (t.dim() - 3) + (0, query_rows // size - query_blocks)).contiguous() for t in masks]
    hidden = pad(hidden.expand(group, -1, -1), (0, 0, 0, query_rows // size - query_blocks)).contiguous()
    step = column_blocks * size if columns.shape[0] > 1 else 0
    at = torch.tensor([blocks.first - before, key_rows, step], device=q.device)
    out = _run(q, keys, values, masks, hidden, at, scale, size)
    return out.masked_fill(pad(nothing, (0, out.shape[2] - nothing.shape[1]))[None, :, :, None], 0)


def _extended(t: Tensor, columns: Tensor, rows: int, width: int) -> Tensor:
    """``t [1, 1, S, D]`` with zeros up to ``rows``, then per list its columns ``[L, C]`` with zeros up to ``width``."""
    out = t.new_zeros(1, 1, rows + columns.shape[0] * width, t.shape[3])
    out[:, :, : t.shape[2]] = t
    if width:
        into = out[0, 0, rows:].unflatten(0, (-1, width))
        into[:, : columns.shape[1]] = t[0, 0][columns]
    return out


def _columns(blocks: BlockList, columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(bool ``[L, NQ, width]``: the columns a query block may not read, int ``[L, NQ]``: where its last one stands)."""
    lists, query_blocks = blocks.counts.shape[1:]
    first = blocks.first // blocks.block
    begins = torch.arange(first, first + query_blocks, device=columns.device)[:, None] * blocks.block
    given = torch.arange(columns.shape[1], device=columns.device) < blocks.column_counts[0, :, None]
    sees = given[:, None] & (columns[:, None] < begins)  # ascending, so these are the first ones
    seen = sees.sum(-1)
    listed = blocks.block_mask()[0]
    sees &= ~listed.gather(2, (columns // blocks.block)[:, None].expand(-1, query_blocks, -1))
    hidden = torch.ones(lists, query_blocks, width, dtype=torch.bool, device=columns.device)
    hidden[..., : columns.shape[1]] = ~sees
    return hidden, seen.masked_fill(~sees.any(-1), 0)


def _partial_and_full(
    blocks: BlockList, seen: Tensor, key_blocks: int, column_blocks: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(counts ``[L, NQ]``, indices ``[L, NQ, W]``) of the blocks under the mask and of those read whole, int32.

    W is all blocks there are. Last, bool ``[L, NQ * block]``: the queries that read nothing.
    """
    indices = blocks.indices[0]
    counts = blocks.counts[0]
    lists, query_blocks, width = indices.shape
    first = blocks.first // blocks.block
    total = key_blocks + lists * column_blocks
    at = torch.arange(first, first + query_blocks, device=counts.device)
    last = indices.gather(2, (counts - 1).clamp(min=0)[..., None].long())[..., 0] if width else counts
    own = (counts > 0) & (last == at)
    begin = key_blocks + torch.arange(lists, device=counts.device)[:, None, None] * column_blocks
    partial = (
        begin + torch.arange(total, device=counts.device) - own[..., None].int()
    )  # the columns' blocks, one place on after its own
    partial[..., 0] = torch.where(own, at, partial[..., 0])
    partial_counts = own + (seen + blocks.block - 1) // blocks.block
    nothing = ((counts == 0) & (seen == 0)).repeat_interleave(blocks.block, 1)
    whole = pad(indices, (0, total - width))
    return (
        (partial_counts.int(), partial.clamp(max=total - 1).int()),
        ((counts - own.int()).int(), whole.int()),
        nothing,
    )


@torch.compiler.disable  # a compiled model must not trace into what is compiled here
def _run(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], hidden: Tensor, at: Tensor, scale: float, size: int
) -> Tensor:
    """Call the compiled kernel, whose lengths are open and whose other sizes are constants."""
    import torch._dynamo as dynamo

    for tensor, places in ((q, (2,)), (k, (2,)), (v, (2,)), *((t, range(2, t.dim())) for t in masks), (hidden, (1, 2))):
        for place in places:
            dynamo.mark_dynamic(tensor, place)
    # Sizes that differ from call to call would become open as well, which the CPU's template does not compile.
    with dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=VARIANTS):
        return _compiled()(q, k, v, *masks, hidden, at, scale, size)


@cache
def _compiled() -> Callable[..., Tensor]:
    """The kernel, compiled at the first call."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def attend(q, k, v, counts, indices, whole_counts, whole_indices, hidden, at, scale, size):
        def reads(batch, head, i, j):
            column = (j - at[1] - head * at[2]).clamp(min=0)
            return torch.where(j < at[1], j <= i + at[0], ~hidden[head, i // size, column])

        mask = BlockMask.from_kv_blocks(
            counts,
            indices,
            whole_counts,
            whole_indices,
            BLOCK_SIZE=size,
            mask_mod=reads,
            seq_lengths=(q.shape[2], k.shape[2]),
            compute_q_blocks=False,
        )
        # Triton's tiles must fit into the blocks, and one kernel must serve short prompts too; the CPU takes neither.
        options = {"BLOCK_M": size, "BLOCK_N": size, "FORCE_USE_FLEX_ATTENTION": True} if q.is_cuda else None
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options)

    return torch.compile(attend, fullgraph=True)
