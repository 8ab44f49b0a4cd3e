"""What ships beside the code: tiny models, trained by the scripts in ``examples/train_tiny``, and a book to read.

Beside the models one that comes in a package goes by a name of ours: SmolLM2-135M-Instruct (``model/checkpoint.py``).
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

FOLDER = Path(__file__).parent
OWNER = "hf-longctx"
REAL = "smollm2-135m-instruct"
BOOK = FOLDER / "texts" / "the-voyage-out.txt"  # Virginia Woolf, 1915; in the public domain, see the .md beside it


def asset(name: str) -> Path:
    """The folder of an embedded model, as ``from_pretrained`` takes it.

    Raises:
        ConfigError: there is no such model.
    """
    known = assets()
    if name not in known:
        raise ConfigError(f"no embedded model '{name}'; there are: {', '.join(known)}; and {REAL}, from a package.")
    return FOLDER / name


def assets() -> list[str]:
    """Names of the embedded models, sorted."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").exists())


def embedded(model: str) -> str:
    """What ``from_pretrained`` takes for ``model``: the folder of a model of ours (``hf-longctx/NAME``), else itself.

    That is an embedded one, or ``hf-longctx/smollm2-135m-instruct``, which is converted at its first use. A folder
    that is really there wins over them.

    Raises:
        ConfigError: ``hf-longctx/NAME`` names none of them, or the real checkpoint is not installed.
    """
    owner, _, name = model.rpartition("/")
    if owner != OWNER or Path(model).exists():
        return model
    if name == REAL:
        from ..model.checkpoint import real_checkpoint

        return str(real_checkpoint())
    return str(asset(name))
