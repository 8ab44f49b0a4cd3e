"""``@pytest.mark.spanning``: the fast suite runs a few of a test's cases, in which every value of every axis stands.

The full product of the axes is the slow suite's. An axis is the list of one ``parametrize``. Parameters that the mark
names are axes of their own, though they share a list; several names in a tuple are one axis, whose pairs all stand.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def spanning(cases: Sequence[frozenset[Hashable]]) -> list[int]:
    """Indices of some of the cases, in which all that stands in any of them does: the least seen first."""
    missing, seen, chosen = set().union(*cases), Counter(), []
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(cases[i] & missing), -sum(seen[one] for one in cases[i]), -i))
        missing -= cases[best]
        seen.update(cases[best])
        chosen.append(best)
    return sorted(chosen)


def values(item) -> frozenset[Hashable]:
    """What stands in a test's case: the axis and the value of each."""
    given = item.callspec.params
    named = {(one,) if isinstance(one, str) else tuple(one) for one in item.get_closest_marker("spanning").args}
    apart = {name for axis in named for name in axis}
    if missing := apart - set(given):
        raise ValueError(f"{item.nodeid}: the mark spanning names {sorted(missing)}, which are no parameters of it")
    lists = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
    axes = named | {tuple(name for name in one if name not in apart) for one in lists}
    return frozenset((axis, tuple(_key(given[name]) for name in axis)) for axis in axes if axis)


def _names(names: str | Sequence[str]) -> list[str]:
    return [one.strip() for one in names.split(",")] if isinstance(names, str) else list(names)


def _key(value) -> Hashable:
    """Equal values are one; what cannot be hashed is one object in all cases."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def left_to_the_slow(items) -> list:
    """Of collected tests, the cases that only the slow suite runs by the mark ``spanning``."""
    groups = defaultdict(list)
    for item in items:
        if item.get_closest_marker("spanning") and not item.get_closest_marker("slow"):
            groups[item.path, item.nodeid.split("[")[0]].append(item)
    left = []
    for group in groups.values():
        kept = set(spanning([values(item) for item in group]))
        left += [item for i, item in enumerate(group) if i not in kept]
    return left
