"""The native kernel given what does not fit together: an error in words, and never a crash.

Each call runs in a forked child, because without the check it ends the process or reads memory that is not its own.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from helpers import calls
from helpers.calls import causal, decode, dense

from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import native
from hf_longctx.kernels._quantized import Quantised
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.ragged import Ragged
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

B, N, G, D, S = 2, 2, 4, 32, 96
RIGHT, REFUSED, OTHER = 0, 1, 2


@pytest.fixture(autouse=True)
def _compiled():
    assert native.supports(dispatch.Case(torch.device("cpu"), torch.float32, D)) is None


def tensor(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def kv(heads=N, tokens=S, dim=D, batch=B):
    return tensor(batch, heads, tokens, dim)


def queries(tokens=1, heads=N * G):
    return tensor(B, heads, tokens, D)


def segment(k=None, v=None, length=S, **kwargs):
    return Segment(kv() if k is None else k, kv() if v is None else v, length, **kwargs)


def piece(bits=8, group=16, length=S, **changed):
    made = Quantised.empty(kv(), kv(), N, S, bits, group, 0)
    for low in range(0, S, group):
        made.write(slice(None), low, kv(tokens=group), kv(tokens=group))
    return replace(made, lengths=(length,), **changed)


def ragged(**changed):
    """Parts of 0 to S tokens in a buffer of 2 S."""
    starts, lengths = torch.tensor([[0, S], [S, 3]]), torch.tensor([[S, 0], [S, 40]])
    made = Ragged(*torch.randn(2, 2 * S, D), torch.arange(2 * S), starts, lengths, torch.randn(2 * S))
    return replace(made, **{name: how(getattr(made, name)) for name, how in changed.items()})


def ended(call) -> tuple[int, str]:
    """How a forked child ended that makes the call: with a result, an error in words, another one, or a signal."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            torch.set_num_threads(1)
            call()
            status = RIGHT
        except (ValueError, RuntimeError) as error:  # torch's own, where the call is its own
            os.write(write, str(error).encode()[:500])
            status = REFUSED
        except BaseException as error:  # noqa: BLE001 what else it may be is the finding
            os.write(write, repr(error).encode()[:500])
            status = OTHER
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as said:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read()


def lists(**changed):
    mask = torch.ones(B, N * G, 2, 2, dtype=torch.bool)
    columns = torch.zeros(B, N * G, S, dtype=torch.bool).index_fill(2, torch.tensor([3]), True)
    return replace(BlockList.from_mask(mask, columns, block=64, first=0, kv_len=S), **changed)


def sparse(**changed):
    k, v = changed.pop("k", kv()), changed.pop("v", kv())
    return calls.sparse(native, queries(S), k, v, lists(**changed), 0.3)


def streaming(sink=4, first=4, recent=16, tokens=S, band=S, v=S, sinks_v=4):
    parts = (kv(tokens=sink), kv(tokens=sinks_v), kv(tokens=band), kv(tokens=v))
    return calls.streaming(native, queries(tokens), *parts, recent=recent, first=first, scale=0.3)


@pytest.mark.parametrize("call", [
    lambda: decode(native, queries(), [segment()], 0.3),
    lambda: decode(native, queries(), [piece(), segment()], 0.3),
    lambda: decode(native, queries(), [piece(bits=4)], 0.3),
    lambda: decode(native, queries(), [ragged(), segment()], 0.3),
    lambda: decode(native, queries(), [ragged(), ragged()], 0.3),
    lambda: dense(native, queries(40), kv(), kv(), 0.3),
    streaming,
    sparse,
])  # fmt: skip
def test_a_control_that_the_calls_are_right_otherwise(call):
    assert ended(call) == (RIGHT, "")


def both(length, **kwargs):
    """Decode and prefill over a segment."""
    return [
        lambda: decode(native, queries(), [segment(length=length, **kwargs)], 0.3),
        lambda: causal(native, queries(40), [segment(length=length, **kwargs)], 0.3),
    ]


@pytest.mark.parametrize("call", [
    *both(S + 1),
    *both(-1),
    *both(2**62),
    *both(S, v=kv(tokens=S - 1)),
    *both(S, v=kv(tokens=0)),
    *both(S, k=kv(heads=3), v=kv(heads=3)),
    *both(S, k=kv(heads=0), v=kv(heads=0)),
    *both(S, k=kv(heads=N * G * 2), v=kv(heads=N * G * 2)),
    *both(torch.tensor([S])),
    *both(torch.tensor([S] * 3)),
    *both(torch.tensor([[S, S]])),
    lambda: decode(native, queries(), [segment(bias=tensor(B, 1, 1, S - 1))], 0.3),
])  # fmt: skip
def test_segments_that_do_not_fit(call):
    status, said = ended(call)
    assert status == REFUSED and ("do not belong together" in said or "expanded size" in said)


@pytest.mark.parametrize("changed", [
    *({name: how} for name in ("k", "k_scale", "v", "v_scale") for how in (
        lambda x: x[..., :0], lambda x: x[:, :1], lambda x: x[:1], lambda x: x[:, :, :1], lambda x: x.double(),
    )),
    {"bits": lambda _: 3}, {"bits": lambda _: 16}, {"group": lambda _: 1}, {"group": lambda _: 0},
    {"group": lambda _: 7}, {"lengths": lambda _: (S + 1,)}, {"lengths": lambda _: (-1,)},
    {"lengths": lambda _: (3, S, S)},
])  # fmt: skip
@pytest.mark.parametrize("plain", [True, False])
def test_packed_pieces_that_do_not_fit(changed, plain):
    made = piece()
    ((name, how),) = changed.items()
    wrong = replace(made, **{name: how(getattr(made, name))})
    status, said = ended(lambda: decode(native, queries(), [wrong] + [segment()] * plain, 0.3))
    assert status == REFUSED and ("do not belong together" in said or "does not unpack" in said)


def test_pieces_of_other_heads_than_the_segments():
    for heads in (1, 4):
        other = segment(k=kv(heads), v=kv(heads))
        status, said = ended(lambda other=other: decode(native, queries(), [piece(), other], 0.3))
        assert status == REFUSED and "segments of" in said


@pytest.mark.parametrize("changed", [
    {"starts": lambda x: x - 1}, {"starts": lambda x: x + 1}, {"lengths": lambda x: x + 1}, {"starts": lambda x: x[:1]},
    {"lengths": lambda x: x - 1}, {"starts": lambda x: x + 2**62}, {"starts": lambda x: x[:, :1]},
    {"lengths": lambda x: x.int()}, {"starts": lambda x: x.T}, {"lengths": lambda x: x.flatten()},
    {"starts": lambda x: x.to("meta")}, {"lengths": lambda x: x.to("meta")},
    {"k": lambda x: x[:-1]}, {"v": lambda x: x[:-1]}, {"v": lambda x: x[:0]},
    {"starts": lambda x: x + (2**63 - 1 - S)}, {"lengths": lambda x: x + (2**63 - 1 - S)},
    {"score_bias": lambda x: x[:-1]}, {"score_bias": lambda x: x.double()}, {"score_bias": lambda x: x.to("meta")},
    {"score_bias": lambda x: x[:1].expand(2 * S)},
])  # fmt: skip
@pytest.mark.parametrize("plain", [True, False])
def test_ragged_parts_that_do_not_fit(changed, plain):
    status, said = ended(lambda: decode(native, queries(), [ragged(**changed)] + [segment()] * plain, 0.3))
    assert status == REFUSED and "do not belong together" in said


@pytest.mark.parametrize(
    "changed", [{"k": torch.Tensor.double}, {"v": torch.Tensor.bfloat16}, {"k": lambda x: x[:, :16]}]
)
def test_ragged_numbers_of_another_kind_are_not_read_as_those_of_the_queries(changed):
    status, said = ended(lambda: decode(native, queries(), [ragged(**changed), segment()], 0.3))
    assert status == REFUSED and "do not belong together" not in said, "torch says it"


def test_ragged_parts_of_other_heads_than_the_segments():
    for heads in (1, 4):
        other = segment(k=kv(heads), v=kv(heads))
        status, said = ended(lambda other=other: decode(native, queries(), [ragged(), other], 0.3))
        assert status == REFUSED and f"2 sequences of {heads} KV heads" in said


@pytest.mark.parametrize("call", [
    lambda: sparse(v=kv(tokens=S - 1)),
    lambda: sparse(block=0),
    lambda: sparse(block=-64),
    lambda: sparse(block=16),
    lambda: sparse(indices=lists().indices + 1),
    lambda: sparse(indices=lists().indices - 1),
    lambda: sparse(indices=lists().indices[:1]),
    lambda: sparse(indices=lists().indices[:, :, :1]),
    lambda: sparse(counts=lists().counts + 1),
    lambda: sparse(counts=lists().counts - 3),
    lambda: sparse(counts=lists().counts[..., :1]),
    lambda: sparse(columns=lists().columns - 4),
    lambda: sparse(columns=lists().columns + S),
    lambda: sparse(column_counts=lists().column_counts + 1),
    lambda: sparse(column_counts=lists().column_counts[:1]),
    lambda: streaming(v=S - 1),
    lambda: streaming(sinks_v=3),
    lambda: streaming(recent=0),
    lambda: streaming(recent=-5),
    lambda: streaming(first=3),
    lambda: streaming(first=-100),
    lambda: streaming(tokens=S + 5),
])  # fmt: skip
def test_lists_and_windows_that_do_not_fit(call):
    status, said = ended(call)
    assert status == REFUSED and "do not belong together" in said


def test_the_library_itself_divides_by_no_zero():
    for kv_heads in (0, -1, 3):

        def call(kv_heads=kv_heads):
            asked = native._Call(Scores(0.3), False)
            asked.run("decode", queries(), kv_heads, [*asked.segments([segment()]), 0, 0, 0])

        status, said = ended(call)
        assert status == REFUSED and f"8 query heads for {kv_heads} KV heads" in said
