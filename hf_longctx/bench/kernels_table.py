"""The table of ``bench kernels``."""

from __future__ import annotations

from collections.abc import Sequence

from .measure import digits

WORDS = {  # of functions
    "dense": "dense prefill",
    "window": "window",
    "blocks": "block lists",
    "few": "16 tokens",
    "decode": "decode",
}


def lines(results: list[dict]) -> list[list[str]]:
    """The heading and a line per result; the JSON has the spread of the times."""
    found = [["function", "dtype", "head_dim", "tokens", "native ms", "torch ms", "times faster"]]
    for result in results:
        ms = [digits(result["columns"][name]["ms"]["median_ms"]) for name in ("native", "torch")]
        case = [WORDS[result["function"]], result["dtype"], str(result["head_dim"]), str(result["tokens"])]
        found.append([*case, *ms, f"{result['faster']:.2f}x"])
    return found


def case_words(result: dict) -> str:
    """What differs between cases besides dtype and tokens."""
    return f"{WORDS[result['function']]}, head_dim {result['head_dim']}"


def sizes(settings: dict) -> str:
    """What the functions read, as the settings say."""
    blocks = joined(settings["densities"])
    return f"; windows of sink {settings['sink']} + recent {settings['recent']}, block lists of {blocks}%"


def joined(numbers: int | Sequence[int]) -> str:
    """One number, or all of them."""
    return str(numbers) if isinstance(numbers, int) else ", ".join(map(str, numbers))
