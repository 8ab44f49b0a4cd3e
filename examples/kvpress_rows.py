"""The rows of ``eviction_beside_kvpress.py``: what a text means on either side, and the tables of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hf_longctx.bench.patterns import parse
from hf_longctx.config.find import load_named
from hf_longctx.errors import ConfigError

DENSE, THEIRS, OURS = "dense", "kvpress", "ours"
PLAIN = {  # rows of ours without a budget, as overrides of the config
    "half_streaming": {},
    "int8": {"stores": {"retrieval": {"store": "quantized"}}},
    "int4": {"stores": {"retrieval": {"store": "quantized", "bits": 4}}},
}
THIN = "thin"
OF_STORE = ("by", "floor", "sink", "recent", "after", "keep", "every")  # other fields are the score's
NAMED = {"after": "after", "keep": "store"}  # fields that name a word, as keep=quantized
PRESSES = (
    *("SnapKV", "AdaKV(SnapKV)", "ExpectedAttention", "AdaKV(ExpectedAttention)", "KVzip"),
    *("Knorm", "TOVA", "KeyDiff", "ThinK"),
)
# The same rules here: what kvpress protects of each method, and nothing more.
SNAPKV = "snapkv:window=64:sink=0:recent=64"
EXPECTED = "expected_attention:sink=4:recent=0"
SAME = {
    "SnapKV": f"{SNAPKV}:by=uniform",
    "AdaKV(SnapKV)": f"{SNAPKV}:by=head",
    "SnapKV by model": f"{SNAPKV}:by=model",
    "ExpectedAttention": f"{EXPECTED}:by=uniform",
    "AdaKV(ExpectedAttention)": f"{EXPECTED}:by=head",
    "ExpectedAttention by model": f"{EXPECTED}:by=model",
    "KVzip": "kvzip:chunk=2048:by=model:sink=4:recent=0",
    "Knorm": "key_norm:by=uniform:sink=0:recent=0",
    "TOVA": "tova:by=uniform:sink=0:recent=1",
    "KeyDiff": "key_diff:by=uniform:sink=0:recent=0",
    "ThinK": THIN,
}
HALVES = ("inside", "after")


@dataclass(frozen=True)
class Row:
    """One way of caching: ``dense``, ``kvpress/PRESS@BUDGET``, ``ours/PRESS@BUDGET`` (the same rule
    here), ``ours/WORD:field=value@BUDGET`` or ``ours/int8``.

    Attributes:
        name: of the press without "Press", or the score with its fields and those of the store.
        budget: share of the tokens that stay, of ThinK and thin of the key channels; None where there is none.
    """

    side: str
    name: str = ""
    budget: float | None = None

    @property
    def label(self) -> str:
        return f"{self.side}/{self.name}" if self.name else self.side

    def __str__(self) -> str:
        return self.label if self.budget is None else f"{self.label}@{self.budget:g}"


def rows_from(text: str, budgets: Sequence[float]) -> list[Row]:
    """The rows of ``TEXT,TEXT``, those that need a budget and name none with each of ``budgets``; no row twice.

    ``kvpress`` stands for every press that is compared, ``ours`` for the same methods here.

    Raises:
        ConfigError: a part is no row.
    """
    found: list[Row] = []
    for part in (one.strip() for one in text.split(",")):
        names = {THEIRS: PRESSES, OURS: (*PLAIN, *SAME)}.get(part)
        for one in [part] if names is None else [f"{part}/{name}" for name in names]:
            found += _rows(one, budgets)
    return list(dict.fromkeys(found))


def _rows(text: str, budgets: Sequence[float]) -> list[Row]:
    label, _, said = text.partition("@")
    side, _, name = label.partition("/")
    if side not in (DENSE, THEIRS, OURS) or (side == DENSE) != (not name):
        raise ConfigError(f"rows: got {text!r}, expected dense, kvpress, ours, kvpress/PRESS or ours/WORD:field=value.")
    plain = side == DENSE or (side == OURS and name in PLAIN)
    if plain and said:
        raise ConfigError(f"rows: got {text!r}, but {label} has no budget. Leave @{said} out.")
    try:
        shares = [float(said)] if said else budgets
    except ValueError:
        raise ConfigError(f"rows: got {text!r}, expected a share after @, e.g. @0.3.") from None
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"rows: got a budget of {', '.join(map(str, shares))}, expected shares above 0, at most 1.")
    return [Row(side, name)] if plain else [Row(side, name, share) for share in shares]


def read_alike(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in groups for which a prompt is read once: whatever its budget, eviction comes after that."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        evicted = row.name not in PLAIN and _word(row) != THIN
        found.setdefault((row.label, None if evicted else row.budget), []).append(row)
    return list(found.values())


def _word(row: Row) -> str:
    return SAME.get(row.name, row.name).partition(":")[0]


def press_of(kvpress: Any, row: Row) -> Any:
    """The press of a row of theirs; ``AdaKV(NAME)`` is the press NAME with budgets by head."""
    inner = row.name.removeprefix("AdaKV(").removesuffix(")")
    field = "key_channel_compression_ratio" if inner == "ThinK" else "compression_ratio"
    made = getattr(kvpress, f"{inner}Press")(**{field: 1 - row.budget})
    return made if inner == row.name else kvpress.AdaKVPress(made)


def overrides_of(row: Row, config: str) -> dict[str, Any]:
    """What a row of ours changes of the config.

    Every head is a retrieval head, unless the row is ``half_streaming`` or says ``heads=config``.
    """
    if row.name in PLAIN:
        return PLAIN[row.name] | ({} if row.name == "half_streaming" else all_retrieval(config))
    fields = parse(SAME.get(row.name, row.name), "rows", "score")
    heads = fields.pop("heads", "all")
    if heads not in ("all", "config"):
        raise ConfigError(f"rows: got heads={heads}, expected all or config.")
    if fields["score"] == THIN:
        store = {"store": THIN, "ratio": round(1 - row.budget, 6), **{k: v for k, v in fields.items() if k != "score"}}
    else:
        own = {key: fields.pop(key) for key in OF_STORE if key in fields}
        own |= {key: {word: own[key]} for key, word in NAMED.items() if key in own}
        store = {"store": "evicted", "rule": fields, "budget": {"share": row.budget}, **own}
    found = {"stores": {"retrieval": store}}
    return found | all_retrieval(config) if heads == "all" else found


def all_retrieval(config: str) -> dict[str, Any]:
    described = load_named(config).model
    return {"heads": {"roles": ["R" * described.num_key_value_heads] * described.num_hidden_layers}}


def quality_table(lines: Sequence[dict], tokens: int) -> list[str]:
    """Per row at this length: right answers, nats per token of the expected ones, and bytes over those of dense.

    The question is inside the prompt that is compressed, or is read after it. Only those count that every row answered;
    the head says how many of either kind.
    """
    mine = [line for line in lines if line["kind"] == "answers" and line["tokens"] == tokens]
    heads = {where: _asked(mine, where) for where in HALVES}
    asked = " + ".join(str(sum(heads[where].values())) for where in HALVES)
    out = [f"| {tokens} tokens, {asked} asked | keep | {' | '.join(HALVES)} | held |", "|---|---|---|---|---|"]
    for label, budget in dict.fromkeys((line["row"], line["budget"]) for line in mine):
        own = [line for line in mine if (line["row"], line["budget"]) == (label, budget)]
        cells = [_quality([line for line in own if line["where"] == where], heads[where]) for where in HALVES]
        shares = [line["bytes"] / line["dense_bytes"] for line in own if "bytes" in line]
        held = f"{median(shares):.2f}" if shares else ""
        out.append(f"| {label} | {keeps(budget)} | {' | '.join(cells)} | {held} |")
    return out


def keeps(budget: float | None) -> str:
    return "" if budget is None else f"{budget:g}"


def _asked(lines: Sequence[dict], where: str) -> dict[str, int]:
    """Questions of each case that all rows answered, where they answered any case."""
    found: dict[tuple, dict[str, int]] = {}
    for line in lines:
        if line["where"] == where and "nll" in line:
            found.setdefault((line["row"], line["budget"]), {})[line["case"]] = len(line["nll"])
    cases = set.intersection(*(set(one) for one in found.values())) if found else set()
    return {case: min(one[case] for one in found.values()) for case in sorted(cases)}


def _quality(lines: Sequence[dict], asked: dict[str, int]) -> str:
    if any("refused" in line for line in lines):
        return "refused"
    by_case = {line["case"]: line for line in lines}
    if not asked or not asked.keys() <= by_case.keys():
        return ""
    nll, right, count = (
        sum(sum(by_case[case][name][:number]) for case, number in asked.items()) for name in ("nll", "right", "counts")
    )
    return f"{right}, {nll / count:.3f}"


def costs_table(lines: Sequence[dict], tokens: int) -> list[str]:
    """Per row at this length: bytes of the cache and of all live tensors over dense, and times."""
    mine = [line for line in lines if line["kind"] == "costs" and line["tokens"] == tokens]
    dense = next((line for line in mine if line["row"] == DENSE), None)
    out = [f"| {tokens} tokens | keep | cache | live | prompt s | token ms |", "|---|---|---|---|---|---|"]
    for line in mine:
        cells = [line["row"], keeps(line["budget"])]
        if "refused" in line or dense is None:
            out.append(f"| {' | '.join(cells)} | refused | | | |")
            continue
        cells += [f"{line[name] / dense['bytes']:.2f}" for name in ("bytes", "live")]
        out.append(f"| {' | '.join(cells)} | {line['prompt_s']:.2f} | {line['token_ms']:.1f} |")
    return out


def measured(lines: Sequence[dict]) -> set[str]:
    """Keys of the lines that need not be measured again: what was refused may be done by a newer version."""
    return {line["key"] for line in lines if "refused" not in line}


def tables(lines: Sequence[dict]) -> Iterator[str]:
    """Quality at every length, then costs; of lines with one key the last counts."""
    lines = list({line["key"]: line for line in lines}.values())
    made: dict[str, Callable[[Sequence[dict], int], list[str]]] = {"answers": quality_table, "costs": costs_table}
    for kind, table in made.items():
        for tokens in sorted({line["tokens"] for line in lines if line["kind"] == kind}):
            yield from (*aligned(table(lines, tokens)), "")


def aligned(table: Sequence[str]) -> list[str]:
    """A Markdown table with cells of equal width, in 80 columns."""
    short = (line.replace("ExpectedAttention", "Expected") for line in table)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in short]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    filled = [
        [cell.ljust(width, "-" if cell.startswith("---") else " ") for cell, width in zip(row, widths, strict=True)]
        for row in rows
    ]
    return [f"| {' | '.join(row)} |" for row in filled]
