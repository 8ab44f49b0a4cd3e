"""Which weights are fastest on this machine, and what do they cost? ``python laptop.py MODEL [--tokens 2k]``.

A model is loaded with weights of 32, 16, 8 and 4 bits, patched, and timed: reading a prompt, and decoded tokens after a
short and after a long one. How far its next-token distributions are from those of 32 bits is measured unpatched, on a
piece of a text, so that it is the weights alone. ``--compile`` times a recipe with compiled tokens as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import patch_model
from hf_longctx.assets import embedded
from hf_longctx.bench.environment import Busy, environment, retune
from hf_longctx.bench.measure import Samples
from hf_longctx.cache.seam import CACHE, cache_of
from hf_longctx.cache.weights import plain_parts
from hf_longctx.evaluate.measures import NextToken, next_token
from hf_longctx.evaluate.prompts import perplexity_text
from hf_longctx.io.console import count, tables
from hf_longctx.planning.sizes import parse_tokens
from hf_longctx.tasks.haystack import TextHaystack

SHORT = 128  # tokens of context
WIDE = 80  # columns
GROUP = 32  # weights that share a step in 4 bits
NAMES = ("", "weights MB", "prefill s", "ms/token short", "ms/token long", "KL", "same token")


@dataclass(frozen=True)
class Recipe:
    """How a model is made light.

    Attributes:
        dtype: of what is computed.
        quantise: of a loaded model, in place.
        load: what ``from_pretrained`` is given.
    """

    dtype: torch.dtype = torch.bfloat16
    quantise: Callable[[nn.Module], None] | None = None
    load: Callable[[], dict[str, Any]] = dict


def int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def w8a8(model: nn.Module) -> None:
    """Activations in 8 bits as well, token by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def int4(model: nn.Module) -> None:
    """The layers; the head over the vocabulary stays: in 4 bits it costs more quality than all layers."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    head = model.get_output_embeddings()
    quantize_(model, PrototypeInt4WeightOnlyConfig(GROUP), filter_fn=lambda one, _: is_linear(one) and one is not head)


def nf4() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(**how)}


RECIPES = {
    "fp32": Recipe(torch.float32),
    "bf16": Recipe(),
    "int8": Recipe(quantise=int8),
    "w8a8": Recipe(quantise=w8a8),
    "int4": Recipe(quantise=int4),
    "nf4": Recipe(load=nf4),
}
DEFAULT = [name for name in RECIPES if name != "nf4"]  # which bitsandbytes makes


@dataclass
class Row:
    """What was measured of one recipe; ``why`` says what it failed of."""

    nbytes: int = 0
    quality: NextToken | None = None
    prefill: Samples = field(default_factory=Samples)
    short: Samples = field(default_factory=Samples)
    long: Samples = field(default_factory=Samples)
    compiling: float | None = None  # seconds until the first tokens
    why: str | None = None

    def cells(self, name: str) -> list[str]:
        if self.why is not None:
            return [name, "failed"]
        kl = f"{self.quality.kl:.1e}"
        times = [f"{self.prefill.median / 1000:.2f}", f"{self.short.median:.1f}", f"{self.long.median:.1f}"]
        return [name, f"{self.nbytes / 1e6:.0f}", *times, kl, f"{self.quality.agreement:.1%}"]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def weight_bytes(model: nn.Module) -> int:
    """Of all weights, packed ones as they are; what is shared counts once."""
    parts = [part for name, one in model.named_parameters() for _, part in plain_parts(name, one)]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def load(name: str, recipe: Recipe) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=recipe.dtype, **recipe.load()).eval()
    if recipe.quantise is not None:
        recipe.quantise(model)
    return model


def compiled_token(model: nn.Module) -> Callable[..., Any]:
    """The model for one token over a cache, in one graph; its weights are packed as it compiles."""
    return torch.compile(model.forward, fullgraph=True, options={"freezing": True})


def read(model: nn.Module, ids: Tensor) -> tuple[Any, Tensor]:
    """The cache of a prompt, and its most likely next token."""
    out = model(ids, use_cache=True, logits_to_keep=1)
    return cache_of(out), out.logits.argmax(-1)


def decode(model: Callable[..., Any], cache: Any, token: Tensor, steps: int, times: Samples) -> None:
    def step() -> Tensor:
        return model(token, **{CACHE: cache}, use_cache=True).logits.argmax(-1)

    step()  # untimed: it makes room for the tokens to come
    for _ in range(steps):
        token = times.time(step)


def warm(model: nn.Module, token: Callable[..., Any]) -> None:
    """Everything once, over two caches."""
    for length in (SHORT // 2, SHORT - 1):
        decode(token, *read(model, torch.full((1, length), 5)), 2, Samples())


@torch.no_grad()
def measure(args: argparse.Namespace, recipe: Recipe, compiled: bool, want: Tensor, row: Row) -> None:
    """One round of a recipe, added to its row."""
    model = load(args.model, recipe)
    row.nbytes = weight_bytes(model)
    if row.quality is None:
        row.quality = next_token(want, model(args.ids[:, : args.quality]).logits[0].float())
    if args.config != "stock":
        patch_model(model, args.config)
    token = compiled_token(model) if compiled else model
    start = time.perf_counter()
    warm(model, token)
    if compiled and row.compiling is None:
        row.compiling = time.perf_counter() - start
    decode(token, *read(model, args.ids[:, :SHORT]), args.steps, row.short)
    kept = row.prefill.time(lambda: read(model, args.ids[:, : args.tokens]))
    decode(token, *kept, args.steps, row.long)


def rows(args: argparse.Namespace) -> dict[str, Row]:
    """By recipe, in the order asked for. Rounds load every recipe anew, so that a slow minute is no recipe's own."""
    with torch.no_grad():
        want = load(args.model, RECIPES["fp32"])(args.ids[:, : args.quality]).logits[0]
    ways = [(name, False) for name in args.recipes] + [(name, True) for name in args.compile]
    found = {way: Row() for way in ways}
    for _ in range(args.rounds):
        for name, compiled in ways:
            row = found[name, compiled]
            if row.why is None:
                try:
                    measure(args, RECIPES[name], compiled, want, row)
                except Exception as error:  # noqa: BLE001 - a recipe that does not run here is a result
                    row.why = f"{type(error).__name__}: {error}".partition("\n")[0]
    return {f"{name}{' compiled' if compiled else ''}": row for (name, compiled), row in found.items()}


def notes(args: argparse.Namespace, found: dict[str, Row], busy: float | None) -> Iterator[str]:
    e = environment()
    yield (
        f"{args.name}; short: {SHORT} tokens, long and prefill: {args.tokens}; config {args.config}; medians of "
        f"{count(args.rounds, 'round')} of {count(args.steps, 'token')}. KL to fp32 (nats) and share of equal most "
        f"likely tokens: {args.quality} positions of {args.text}, unpatched."
    )
    yield (
        f"torch {e['torch']}, transformers {e['transformers']}, hf_longctx {e['hf_longctx']}; {e['cpu']}, "
        f"{count(e['threads'], 'thread')} of {e['cores']} cores; malloc {e['malloc']}."
    )
    for name, row in found.items():
        if row.why is not None:
            yield f"{name}: {row.why}"
        elif row.compiling is not None:
            yield f"{name}: the first tokens came after {row.compiling:.0f} s."
    if (busy or 0) > 0.05:
        yield f"Other processes took {busy:.0%} of the processor meanwhile: do not quote these."


def show(args: argparse.Namespace) -> None:
    args.name, args.model = args.model, embedded(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = perplexity_text(args.text, tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = max(args.tokens, args.quality, SHORT)
    args.ids = torch.from_numpy(TextHaystack(ids).sample(np.random.default_rng(0), length))[None]
    busy = Busy()
    found = rows(args)
    console = Console(width=WIDE)
    for table in tables(None, NAMES, [row.cells(name) for name, row in found.items()], WIDE):
        console.print(table)
    for line in notes(args, found, busy.others()):
        console.print(line, markup=False, highlight=False)


def tokens(text: str) -> int:
    return parse_tokens(text, "--tokens")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder, or a name of ours")
    parser.add_argument("--tokens", type=tokens, default=2048, help="of the long prompt, e.g. 8k")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=DEFAULT)
    parser.add_argument("--compile", nargs="*", choices=RECIPES, default=[], help="recipes to time compiled as well")
    parser.add_argument("--config", default="auto", help="as patch_model takes it; stock: not patched")
    parser.add_argument("--steps", type=int, default=16, help="decoded tokens of every round and length")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--text", default="book", help="a file of text; book: the novel that ships")
    parser.add_argument("--quality", type=tokens, default=512, help="tokens of text to compare with fp32")
    args = parser.parse_args(given)
    if args.compile and args.config == "stock":
        parser.error("--compile compiles tokens over a LongCtxCache: leave out --config stock")
    show(args)


if __name__ == "__main__":
    retune()
    main()
