"""What ships beside the code: tiny models, trained by the scripts in ``examples/train_tiny``, and a book to read."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

FOLDER = Path(__file__).parent
OWNER = "hf-longctx"
BOOK = FOLDER / "texts" / "war_of_the_worlds.txt"  # H. G. Wells, 1898; public domain, see the README beside it


def asset(name: str) -> Path:
    """The folder of an embedded model, as ``from_pretrained`` takes it.

    Raises:
        ConfigError: there is no such model.
    """
    known = assets()
    if name not in known:
        raise ConfigError(f"no embedded model '{name}'; there are: {', '.join(known) or 'none'}.")
    return FOLDER / name


def assets() -> list[str]:
    """Names of the embedded models, sorted."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").exists())


def embedded(model: str) -> str:
    """What ``from_pretrained`` takes for ``model``: the folder of an embedded one (``hf-longctx/NAME``), else itself.

    A folder that is really there wins over an embedded model.

    Raises:
        ConfigError: ``hf-longctx/NAME`` names no embedded model.
    """
    owner, _, name = model.rpartition("/")
    return str(asset(name)) if owner == OWNER and not Path(model).exists() else model
