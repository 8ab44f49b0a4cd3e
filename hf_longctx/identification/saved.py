"""What the saved state of a long identification depends on: another model or other texts must not go on from it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ..cache.fingerprint import weights_digest
from ..config.words import dump
from ..model.modules import state_of, unwrap
from .methods.base import HeadProbe


def depends_on(probe: HeadProbe, text: np.ndarray) -> dict[str, Any]:
    """Plain data that tells the seed, the streaming store, the weights and the texts; ``text`` (token ids) is one."""
    return {
        "seed": probe.seed,
        "streaming": dump(state_of(probe.model).config.stores.streaming, "store"),
        "model": weights_digest(unwrap(probe.model), complete=False),
        "documents": hashlib.sha256(text.tobytes()).hexdigest()[:16],
    }
