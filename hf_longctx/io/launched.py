"""How many processes a launcher (torchrun, ``accelerate launch``, MPI) started, and which of them this is."""

from __future__ import annotations

import os

from ..errors import ConfigError

# Where launchers say so, the names Accelerate reads, in its order.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def launched() -> int:
    """Processes that run the same command; 1 where no launcher says how many.

    Raises:
        ConfigError: what it says is no such number.
    """
    name = _size()
    if name is None:
        return 1
    given = os.environ[name]
    if not given.isascii() or not given.isdecimal() or int(given) < 1:
        raise ConfigError(
            f"the environment variable {name} is {given!r}, expected how many processes were launched: 1, 2, ... "
            f"torchrun and accelerate launch set it; unset {name} to run one."
        )
    return int(given)


def check_rank(count: int) -> None:
    """Refuse a rank that is not one of ``count`` processes: the others would wait for one that never comes.

    Raises:
        ConfigError: no launcher gives this process a number, or none below ``count``.
    """
    name = next((name for name in RANKS if os.environ.get(name)), None)
    if name is None:
        raise ConfigError(
            f"{count} processes were launched, by the environment, but RANK does not say which this is. Start them by "
            f"torchrun or accelerate launch, which set it; unset {_size()} to run one."
        )
    check_number(name, f"{count} processes were launched", count)


def check_number(name: str, why: str, count: int) -> int:
    """The number that the environment variable ``name`` gives, from 0 to ``count`` - 1; ``why`` it must be below.

    Raises:
        ConfigError: it is no such number.
    """
    given = os.environ[name]
    if not given.isascii() or not given.isdecimal() or int(given) >= count:
        expected = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigError(f"the environment variable {name} is {given!r}, expected {expected}: {why}.")
    return int(given)


def _size() -> str | None:
    return next((name for name in SIZES if os.environ.get(name)), None)
