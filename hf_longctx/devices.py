"""Where the weights of a module are."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def device_of(module: nn.Module, within: nn.Module) -> torch.device:
    """The device of a module's weights.

    A module may show none: torch's dynamically quantised layers pack theirs into objects that are no tensors. Then it
    is the device of the first weight of ``within``, the model around it.
    """
    shown = chain(module.parameters(), module.buffers(), within.parameters(), within.buffers())
    return next((tensor.device for tensor in shown), torch.device("cpu"))
