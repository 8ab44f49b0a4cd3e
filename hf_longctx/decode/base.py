"""The base of every decode selection.

A YAML word of this folder names a frozen dataclass in the file of the same name. Its fields are the YAML keys.
"""

from __future__ import annotations

from typing import ClassVar


class SelectSpec:
    """What a YAML word of ``decode/`` defines.

    Attributes:
        roles: the roles whose heads the selection serves.
        reads_all: it reads every kept key, which is all that runs so far: a config with another one is refused.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    reads_all: ClassVar[bool] = False
