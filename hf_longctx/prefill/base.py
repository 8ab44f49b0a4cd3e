"""The base of every prefill pattern.

A YAML word of this folder names a frozen dataclass in the file of the same name. Its fields are the YAML keys.
"""

from __future__ import annotations

from typing import ClassVar


class PatternSpec:
    """What a YAML word of ``prefill/`` defines.

    Attributes:
        roles: the roles (``"retrieval"``, ``"streaming"``) whose heads the pattern serves.
    """

    roles: ClassVar[tuple[str, ...]] = ()
