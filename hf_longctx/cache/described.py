"""What a cache's file says of the plan it was made by, and whether a model has the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config.words import dump
from ..errors import CacheError
from ..stores._saved import Told, short
from ..stores.base import StoreSpec
from . import selections
from .plan import LayerPlan


def describe(plan: LayerPlan) -> dict[str, Any]:
    """What a layer keeps, as plain data: roles, stores, and a selection whose index is saved; all else has no part."""
    stores = {}
    for role in plan.filled:
        stores[role.heads.role] = _portable(role.store)
    plain = {"roles": plan.letters, "own window": plan.window is not None, "stores": stores}
    if kept := [facts for role in plan.filled if (facts := selections.facts(role.decode))]:
        plain["decode"] = kept[0]
    return json.loads(json.dumps(plain))


def _portable(spec: StoreSpec) -> dict[str, Any]:
    """The spec of a store as plain data, without storage locations: its own, and of a store within it."""
    plain = dump(spec, "store")
    within = {name: value for name, value in vars(spec).items() if isinstance(value, StoreSpec)}
    plain |= {name: _portable(value) for name, value in within.items()}
    return {name: value for name, value in plain.items() if name not in spec.places}


def check_same(told: Told, wrong: str, here: Mapping[str, Any]) -> None:
    there = told.value if isinstance(told.value, dict) else told.fields(*here)
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differ:
        said = "; ".join(f"{name}: {short(there.get(name))} there, {short(here.get(name))} here" for name in differ)
        raise CacheError(f"{told.path} {wrong} ({said}). Load it with the one that made it, or read the prompt again.")


def check_layers(told: Told, here: list[dict]) -> None:
    there = told.items()
    if len(there) != len(here):
        raise CacheError(
            f"{told.path} has {len(there)} layers, this model {len(here)}. Load it with the model that made it."
        )
    for number, (before, now) in enumerate(zip(there, here, strict=True)):
        check_same(before, f"was made with another config, layer {number}", now)
