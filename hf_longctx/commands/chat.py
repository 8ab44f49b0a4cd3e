"""The command ``hf-longctx chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..assets import embedded
from ..config.words import check_word, near
from ..errors import ConfigError, LongCtxError
from ._options import DTYPES, Config, Device, Dtype, Model, device_of, load_model

if TYPE_CHECKING:
    from ..prompts.chat import Chat, Turn

HELP = """\
/read FILE   put a UTF-8 text into the conversation, before your next message
/dense       go on dense; the conversation is kept, and read again
/patched     go on patched, likewise
/report      what really ran, and the memory of the cache
/reset       begin anew
/help        this
/quit        end; so does the end of the input (Ctrl-D)
Ctrl-C stops an answer."""
COMMANDS = ("/read", "/dense", "/patched", "/report", "/reset", "/help", "/quit")
WARM = "Sample at this temperature; 0: the most likely token each time."
System = Annotated[str | None, typer.Option(help="The system message.", show_default="the chat template's own")]
Chunk = Annotated[
    int | None, typer.Option(help="Tokens per forward while reading, patched.", min=1, show_default="all")
]


def command(
    model: Model,
    config: Config = "auto",
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help=WARM, min=0)] = 0.0,
    prefill_chunk_size: Chunk = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Chat with a patched model: only new tokens are read each turn, and a line says what the KV cache holds.

    Answers go to standard output, all else to standard error. /help lists what else can be typed.
    """
    from ..prompts.chat import Chat

    check_word(dtype, DTYPES, "--dtype")
    loaded, tokenizer = load_model(embedded(model), dtype, device_of(device))
    options = generate_options(loaded, tokenizer, max_new_tokens, temperature)
    chat = Chat(loaded, tokenizer, config, system=system, chunk_size=prefill_chunk_size, **options)
    Loop(chat).run()


def generate_options(model: Any, tokenizer: Any, most: int, temperature: float) -> dict[str, Any]:
    """Arguments of ``generate`` that neither warn nor sample unless asked to."""
    stop = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop
    options = {"max_new_tokens": most, "pad_token_id": pad[0] if isinstance(pad, list) else pad}
    if temperature:
        return {**options, "do_sample": True, "temperature": temperature}
    return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class Loop:
    """Reads lines until they end; answers them, or does what a command says."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.last: Turn | None = None
        self.ended = False

    def run(self) -> None:
        self.tell(f"{self.way()}. /help lists the commands, /quit ends.")
        for line in typed():
            try:
                if line.startswith("/"):
                    self.do(*line.split(None, 1))
                elif line.strip():
                    self.answer(line)
            except LongCtxError as error:
                self.tell(str(error))
            except KeyboardInterrupt:
                self.tell("\nStopped; what you typed is taken back.")
            if self.ended:
                return

    def answer(self, line: str) -> None:
        turn = self.last = self.chat.say(line, say)
        say("\n")
        if turn.stopped:
            self.tell("Stopped; the answer stays as far as it came.")
        self.tell(live_line(turn, self.chat.patched))
        self.warn()

    def warn(self) -> None:
        """Say that the conversation is longer than the model was made for."""
        from ..config.model import made_for
        from ..model.modules import unwrap

        longest = made_for(unwrap(self.chat.model).config)
        if longest is not None and len(self.chat.ids) > longest:
            self.tell(f"{len(self.chat.ids)} tokens are more than the {longest} that the model was made for.")

    def do(self, word: str, rest: str = "") -> None:
        """A command of the user's.

        Raises:
            ConfigError: there is none of that name, it lacks its argument, or has one too many.
        """
        if word not in COMMANDS:
            raise ConfigError(
                f"{word}: no such command.{near(word, COMMANDS)} /help lists them. A message that begins so: put a "
                "space before it."
            )
        if bool(rest.strip()) != (word == "/read"):
            wanted = "a file's name" if word == "/read" else "nothing"
            raise ConfigError(f"{word}: got {rest.strip()!r}, expected {wanted} after it.")
        does: dict[str, Callable[[], None]] = {
            "/read": lambda: self.tell(f"{self.chat.read(rest.strip())} tokens, before your next message."),
            "/dense": lambda: self.switch(False),
            "/patched": lambda: self.switch(True),
            "/report": self.report,
            "/reset": self.reset,
            "/help": lambda: say(HELP + "\n"),
            "/quit": self.end,
        }
        does[word]()

    def switch(self, patched: bool) -> None:
        self.chat.use(patched)
        self.tell(f"{self.way()}; the conversation is read again at your next message.")

    def end(self) -> None:
        self.ended = True

    def reset(self) -> None:
        self.chat.reset()
        self.last = None
        self.tell("Nothing is read, nothing is said.")

    def report(self) -> None:
        from ..model.report import report

        say(f"conversation  {len(self.chat.ids)} tokens\n")
        say(f"{report(self.chat.model)}\n" if self.chat.patched else "dense         nothing is patched\n")
        if self.last is not None:
            say(f"last answer   {live_line(self.last, self.chat.patched)}\n")

    def way(self) -> str:
        if not self.chat.patched:
            return "dense"
        from ..model.report import report

        told = report(self.chat.model)
        return f"patched: {told.retrieval_heads} of {told.kv_heads} KV heads {told.kept}"

    def tell(self, text: str) -> None:
        """What is no answer: on standard error, in order with what stands on standard output."""
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def live_line(turn: Turn, patched: bool) -> str:
    """What an answer took: tokens read and reused, the KV cache, and when its tokens came."""
    parts = [f"read {turn.read}, reused {turn.reused}"]
    if turn.nbytes is not None:
        name, unit = ("GB", 1e9) if turn.nbytes_dense >= 1e9 else ("MB", 1e6)
        dense = f"of dense {turn.nbytes_dense / unit:.3g} {name}, {turn.nbytes / turn.nbytes_dense:.0%}"
        parts.append(f"KV {turn.nbytes / unit:.3g} {dense if patched else f'{name}, dense'}")
    if turn.first_s is not None:
        after = "" if turn.tokens_per_s is None else f", {turn.tokens_per_s:.1f}/s"
        parts.append(f"first {turn.first_s:.2f} s{after}")
    return " | ".join(parts)


def say(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def typed() -> Iterator[str]:
    """The lines that are typed, with a prompt and a history on a terminal; elsewhere those of standard input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() a history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("\n")
            return
        except KeyboardInterrupt:  # of a line half typed, as in a shell
            say("\n")
