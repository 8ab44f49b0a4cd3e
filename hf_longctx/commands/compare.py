"""The command ``hf-longctx compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..assets import embedded
from ..config.words import check_word
from ..io.console import console
from ..io.environment import environment
from ._options import (
    DTYPES,
    JSON,
    Config,
    Device,
    Dtype,
    Json,
    Model,
    check_output,
    device_of,
    load_model,
    write_json,
)

Chat = Annotated[bool, typer.Option("--chat", help="The file is a user's message: the chat template goes around it.")]
Positions = Annotated[int, typer.Option(help="Tokens at the end of the prompt whose prediction is compared.", min=0)]
Chunk = Annotated[int | None, typer.Option(help="Tokens of the prompt per forward.", min=1, show_default="all")]


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
    check_output(json, JSON, "--json")
    text = read_text(prompt_file, "--prompt-file")
    loaded, tokenizer = load_model(embedded(model), dtype, device_of(device))
    comparison = compare(
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
    write_json(json, {"environment": environment(), **comparison.as_dict()})
    console().print(str(comparison), markup=False, highlight=False, soft_wrap=True)
