"""The embedded tiny models, trained by the scripts in ``examples/train_tiny``: real weights, real retrieval heads."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

FOLDER = Path(__file__).parent


def asset(name: str) -> Path:
    """The folder of an embedded model, as ``from_pretrained`` takes it.

    Raises:
        ConfigError: there is no such model.
    """
    known = sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").exists())
    if name not in known:
        raise ConfigError(f"no embedded model '{name}'; there are: {', '.join(known) or 'none'}.")
    return FOLDER / name
