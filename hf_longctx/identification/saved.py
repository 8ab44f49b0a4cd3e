"""What the saved state of a long identification depends on: another model or other texts must not go on from it."""

from __future__ import annotations

import hashlib
from typing import Any

from ..cache.fingerprint import weights_digest
from ..config.words import dump
from ..model.modules import state_of, unwrap
from ..tasks.documents import Document
from .methods.base import HeadProbe


def depends_on(probe: HeadProbe, document: Document) -> dict[str, Any]:
    """Plain data that tells the seed, the streaming store, the weights and the texts, of which ``document`` is one."""
    return {
        "seed": probe.seed,
        "streaming": dump(state_of(probe.model).config.stores.streaming, "store"),
        "model": weights_digest(unwrap(probe.model), complete=False),
        "documents": hashlib.sha256(document.ids.tobytes()).hexdigest()[:16],
    }
