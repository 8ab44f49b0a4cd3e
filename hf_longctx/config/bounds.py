"""Bounds that fields of many specs share, as field metadata: every number has bounds, every count a unit."""

from __future__ import annotations

MOST = 2**31 - 1  # kernels count tokens and sequences in 32 bits
LARGEST = 1e30  # of a score: sums and means of as many as a model has stay finite
MOST_LAYERS = MOST_HEADS = 4096

COUNT = {"min": 1, "max": MOST}
TOKENS = {**COUNT, "unit": "tokens"}
TOKENS_OR_NONE = {**TOKENS, "min": 0}
SHARE = {"min": 0.0, "max": 1.0}
SCORE = {"min": -LARGEST, "max": LARGEST}
FREE = {"free": True}  # metadata: the field is stored and shown, and ignored at run time
