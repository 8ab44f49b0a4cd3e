"""How many processes a launcher (torchrun, ``accelerate launch``, MPI) started, by the environment."""

from __future__ import annotations

import os

from ..errors import ConfigError

# Where launchers say so, the names Accelerate reads, in its order.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> int:
    """Processes that run the same command; 1 where no launcher says how many.

    Raises:
        ConfigError: what it says is no such number.
    """
    name = next((name for name in SIZES if os.environ.get(name)), None)
    if name is None:
        return 1
    given = os.environ[name]
    if not given.isascii() or not given.isdecimal() or int(given) < 1:
        raise ConfigError(
            f"the environment variable {name} is {given!r}, expected how many processes were launched: 1, 2, ... "
            f"torchrun and accelerate launch set it; unset {name} to run one."
        )
    return int(given)
