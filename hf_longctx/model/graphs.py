"""What records a forward as one fixed graph cannot record a patched one, which looks at its lengths, pads and cache."""

from __future__ import annotations

import torch

from ..errors import UnsupportedModeError

WHY = (
    "a patched model decides by the lengths, pads and cache of each forward, so it is never one fixed graph, but for "
    "one new token of each sequence over a LongCtxCache, without autocast, in a model whose layers all cache keys and "
    "have no softcap or sinks"
)


def refuse_graphs() -> None:
    """Refuse to be exported or traced; under torch.compile break the graph, or say why it cannot be whole.

    Raises:
        UnsupportedModeError: torch.export, torch.jit.trace or an ONNX exporter runs this forward.
    """
    if torch.compiler.is_dynamo_compiling():
        _break_graph()
    elif torch.compiler.is_exporting() or torch.jit.is_tracing():
        recorder = "torch.export" if torch.compiler.is_exporting() else "torch.jit.trace"
        raise UnsupportedModeError(
            f"{recorder}: {WHY}. Export the model without its patch: unpatch_model(model) first."
        )


@torch.compiler.disable(
    reason=f"{WHY}: leave out fullgraph=True (torch.compile), or unpatch_model(model) first (torch.export)"
)
def _break_graph() -> None:
    """With fullgraph=True, torch.compile and torch.export end here, and say the reason."""
