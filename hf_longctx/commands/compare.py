"""The command ``hf-longctx compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..assets import embedded
from ..config.words import check_word
from ..errors import ConfigError, UnsupportedModeError
from ..io.console import console
from ..io.environment import environment
from ..io.launched import launched
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

MANY_PROCESSES = True  # --prompts shares them
FILE = "A prompt, a UTF-8 text; or --prompts."
SET = "Many: JSON lines with prompt or messages, and where wanted answer and id; or --prompt-file."
SWEEP = "With --prompts: FIELD=VALUE,VALUE of the config, one more variant each, as in eval."
ROUNDS = "With --prompt-file: timed runs of either way; 0 measures no times."
TAIL = "With --prompt-file: tokens at the end of the prompt whose prediction is compared."
File = Annotated[Path | None, typer.Option(help=FILE, dir_okay=False)]
Prompts = Annotated[Path | None, typer.Option(help=SET, dir_okay=False)]
Chat = Annotated[bool, typer.Option("--chat", help="A text is a user's message: the chat template goes around it.")]
Sweep = Annotated[str | None, typer.Option(help=SWEEP)]
Positions = Annotated[int | None, typer.Option(help=TAIL, min=0, show_default="256")]
Rounds = Annotated[int | None, typer.Option(help=ROUNDS, min=0, show_default="3")]
Chunk = Annotated[int | None, typer.Option(help="Tokens of the prompt per forward.", min=1, show_default="all")]


def command(
    model: Model,
    prompt_file: File = None,
    prompts: Prompts = None,
    config: Config = "auto",
    sweep: Sweep = None,
    chat: Chat = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 64,
    prompt_positions: Positions = None,
    rounds: Rounds = None,
    prefill_chunk_size: Chunk = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Dense against patched on prompts of yours: where answers part, agreement, KL, likelihood, KV bytes and times.

    One prompt (--prompt-file) or many (--prompts): means with intervals, the worst first. Many are shared by several
    processes: `torchrun --nproc-per-node 2 -m hf_longctx compare ...`.
    """
    from ..evaluate.compare import compare
    from ..evaluate.compare_prompts import compare_prompts
    from ..evaluate.plan import values_of
    from ..evaluate.prompts import read_text
    from ..io.json_lines import json_lines
    from ..io.processes import Processes

    check_word(dtype, DTYPES, "--dtype")
    check_output(json, JSON, "--json")
    one = {"prompt_positions": prompt_positions, "rounds": rounds}
    one = {name: value for name, value in one.items() if value is not None}
    _check_either(prompt_file, prompts, one, sweep)
    if prompts is None and (processes := launched()) > 1:
        raise UnsupportedModeError(
            f"--prompt-file: {processes} processes were launched, and each would run the one prompt. Run it without "
            "torchrun and accelerate launch, or give many prompts (--prompts), which they share."
        )
    text = None if prompt_file is None else read_text(prompt_file, "--prompt-file")
    if prompts is not None:  # these two: what is wrong is refused before the model loads
        json_lines(prompts, "--prompts")
        list(values_of(sweep) if sweep is not None else ())
    place = device_of(device)
    main = Processes(place).main
    loaded, tokenizer = load_model(embedded(model), dtype, place)
    both = {
        "config": config,
        "tokenizer": tokenizer,
        "max_new_tokens": max_new_tokens,
        "prefill_chunk_size": prefill_chunk_size,
        "progress": main,
    }
    if prompts is not None:
        found = compare_prompts(loaded, prompts, sweep=sweep, chat=chat, **both)
    else:
        found = compare(loaded, [{"role": "user", "content": text}] if chat else text, **one, **both)
    if not main:
        return
    write_json(json, {"environment": environment(), **found.as_dict()})
    console().print(str(found), markup=False, highlight=False, soft_wrap=True)


def _check_either(prompt_file: Path | None, prompts: Path | None, one: dict[str, Any], sweep: str | None) -> None:
    if (prompt_file is None) == (prompts is None):
        raise ConfigError(
            f"--prompt-file and --prompts: got {'both' if prompts else 'neither'}, expected one of them: the text of "
            "one prompt, or JSON lines with many."
        )
    if prompts is None and sweep is not None:
        raise ConfigError("--sweep: varies a field over many prompts; it goes with --prompts, not with --prompt-file.")
    if prompts is not None and one:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in one)
        raise ConfigError(f"{options}: of one prompt alone, with --prompt-file; leave it out with --prompts.")
