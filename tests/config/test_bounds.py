"""Every number that a config or a command line may give has bounds, and every count a unit."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from helpers.config_cases import config, refused
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxConfig, patch_model, unpatch_model
from hf_longctx.config.bounds import MOST, MOST_HEADS, MOST_LAYERS
from hf_longctx.config.checks import MOST_ITEMS
from hf_longctx.config.words import load, words
from hf_longctx.evaluate.plan import Options

FOLDERS = ("stores", "prefill", "decode", "eviction", "eviction.after", "identification.methods", "tasks.synthetic")
BOUNDED = ("min", "above"), ("max",)


def specs() -> list[type]:
    return [LongCtxConfig, Options, *(load(folder, word) for folder in FOLDERS for word in words(folder))]


def numbers(cls: type) -> Iterator[tuple[str, type, dict]]:
    """(name, int or float, metadata) of every number of a dataclass and of those inside it, in lists as well."""
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        if one.init:
            yield from _numbers(f"{cls.__name__}.{one.name}", hints[one.name], one.metadata)


def _numbers(name: str, hint: object, metadata: typing.Mapping) -> Iterator[tuple[str, type, dict]]:
    if hint in (int, float):
        yield name, hint, metadata
    elif dataclasses.is_dataclass(hint):
        yield from numbers(hint)
    for inner in typing.get_args(hint):
        yield from _numbers(name, inner, metadata)


def faults(cls: type) -> list[str]:
    found = []
    for name, kind, metadata in numbers(cls):
        if "choices" in metadata:
            continue
        for keys in BOUNDED:
            if not any(math.isfinite(metadata.get(key, math.inf)) for key in keys):
                found.append(f"{name} has no {' or '.join(keys)}")
        if kind is int and not name.endswith(".seed") and not metadata.get("unit"):
            found.append(f"{name} has no unit")
        if metadata.get("unit") == "tokens" and metadata.get("max", 0) > MOST:
            found.append(f"{name} may be more tokens than kernels can count")
    return found


@pytest.mark.parametrize("cls", specs(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_number_has_bounds_and_a_unit(cls):
    assert faults(cls) == []


def test_numbers_are_found_wherever_they_stand():
    @dataclass(frozen=True)
    class Spec:
        bare: int = 1
        share: float | None = field(default=None, metadata={"min": 0.0})
        rows: tuple[tuple[float, ...], ...] = field(default=(), metadata={"above": 0.0, "max": math.inf})
        named: dict[str, int] = field(default_factory=dict, metadata={"min": 0, "max": 2**40, "unit": "tokens"})
        word: str = "x"
        flag: bool = True
        bits: int = field(default=8, metadata={"choices": (8, 4)})

    assert faults(Spec) == [
        "Spec.bare has no min or above",
        "Spec.bare has no max",
        "Spec.bare has no unit",
        "Spec.share has no max",
        "Spec.rows has no max",
        "Spec.named may be more tokens than kernels can count",
    ]
    assert {name for name, *_ in numbers(LongCtxConfig)} >= {
        "Fingerprint.vocab_size",
        "HeadsSection.scores",
        "PrefillTable.map",
    }
    assert {name for name, *_ in numbers(load("stores", "evicted"))} >= {"Budget.tokens", "Budget.share"}


def test_a_row_is_never_longer_than_a_list_may_be():
    assert max(MOST_LAYERS, MOST_HEADS) <= MOST_ITEMS


@pytest.mark.parametrize("name", ["sink", "recent"])
@pytest.mark.parametrize("number", [MOST + 1, 2**63 - 2, 2**63, 10**300])
def test_a_window_beyond_what_kernels_count_is_refused(name, number):
    data = config().to_dict()
    data["stores"]["streaming"][name] = number
    message = refused(lambda: LongCtxConfig.from_dict(data), f"stores.streaming.{name}: got ", f"at most {MOST}")
    assert "(tokens)" in message and len(message) < 250


def test_a_config_object_is_checked_as_well():
    model = tiny_model()
    made = config_for(model)
    huge = dataclasses.replace(made.stores.streaming, recent=2**63 - 1)
    given = dataclasses.replace(made, stores=dataclasses.replace(made.stores, streaming=huge))
    refused(lambda: patch_model(model, given), "stores.streaming.recent: got 9223372036854775807")


@pytest.mark.parametrize("kernel", ["auto", "cpu", "reference"])
def test_the_largest_windows_keep_everything(kernel):
    torch.manual_seed(0)
    model = tiny_model(head_dim=16)
    ids = torch.randint(3, 97, (1, 300))
    answers = {}
    for kept in (400, MOST):
        patch_model(model, config_for(model, "streaming", sink=kept, recent=kept, kernel=kernel))
        with torch.no_grad():
            out = model(ids[:, :250], use_cache=True)
            parts = [out.logits]
            for cut in (slice(250, 299), slice(299, 300)):
                out = model(ids[:, cut], past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits)
        answers[kept] = torch.cat(parts, 1)
        unpatch_model(model)
    torch.testing.assert_close(answers[400], answers[MOST], rtol=0, atol=0)
