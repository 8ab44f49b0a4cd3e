"""The command ``hf-longctx compare``."""

from __future__ import annotations

import json as to_json
from pathlib import Path
from typing import Annotated

import typer

from ..assets import embedded
from ..bench.environment import environment
from ..config.words import check_word
from ..io.console import console
from ._options import DTYPES, check_output, device_of, load_model
from .identify import Config, Device, Dtype, Model

Chat = Annotated[bool, typer.Option("--chat", help="The file is a user's message: the chat template goes around it.")]
Positions = Annotated[int, typer.Option(help="Tokens at the end of the prompt whose prediction is compared.", min=0)]
Chunk = Annotated[int | None, typer.Option(help="Tokens of the prompt per forward.", min=1, show_default="all")]
SAVED = "Write everything, the tokens too, and the versions here."
Json = Annotated[Path | None, typer.Option("--json", help=SAVED, dir_okay=False)]


def command(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="The prompt, a UTF-8 text.", dir_okay=False)],
    config: Config = "auto",
    chat: Chat = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 64,
    prompt_positions: Positions = 256,
    rounds: Annotated[int, typer.Option(help="Timed runs of either way; 0 measures no times.", min=0)] = 3,
    prefill_chunk_size: Chunk = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Dense against patched on a prompt of yours: where the answers part, agreement, KL, KV bytes and times."""
    from ..evaluate.compare import compare
    from ..evaluate.prompts import read_text

    check_word(dtype, DTYPES, "--dtype")
    if json is not None:
        check_output(json, (".json",), "--json")
    text = read_text(prompt_file, "--prompt-file")
    loaded, tokenizer = load_model(embedded(model), dtype, device_of(device))
    found = compare(
        loaded,
        [{"role": "user", "content": text}] if chat else text,
        config=config,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        prompt_positions=prompt_positions,
        rounds=rounds,
        prefill_chunk_size=prefill_chunk_size,
        progress=True,
    )
    if json is not None:
        json.write_text(to_json.dumps({"environment": environment(), **found.as_dict()}, indent=1) + "\n", "utf-8")
    console().print(str(found), markup=False, highlight=False, soft_wrap=True)
