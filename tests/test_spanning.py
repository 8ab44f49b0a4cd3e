"""The mark ``spanning``: in the fast suite stands every value of every axis, and nothing is lost to both suites."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers.spanning import left_to_the_slow, spanning

AXES = ("abcdefg", "ab", "abc")


class Item:
    """Of a collected test, what the mark looks at."""

    path = Path("test_it.py")

    def __init__(self, params: dict, marks, name: str = "test_it"):
        self.callspec, self.marks, self.nodeid = self, marks, f"{name}[{params}]"
        self.params = params

    def iter_markers(self, name):
        return (one for one in self.marks if one.name == name)

    def get_closest_marker(self, name):
        return next(self.iter_markers(name), None)


def items(*named: str, slow=(), name: str = "test_it") -> list[Item]:
    """A test over 4 cases, two of which share each part of their names, by 5 sizes, two of which are equal numbers."""
    lists = pytest.mark.parametrize(("a", "b"), ()).mark, pytest.mark.parametrize("size", ()).mark
    marks = [pytest.mark.spanning(*named).mark, *lists]
    product = itertools.product("xy", "uv", (1, True, 1.0, [2], [2]))
    found = [Item({"a": a, "b": b, "size": size}, list(marks), name) for a, b, size in product]
    for at in slow:
        found[at].marks.append(pytest.mark.slow.mark)
    return found


def fast(found: list[Item]) -> list[dict]:
    left = left_to_the_slow(found)
    return [one.params for one in found if one not in left and not one.get_closest_marker("slow")]


def test_every_value_stands_in_some_case_and_few_cases_are_taken():
    cases = [frozenset(enumerate(values)) for values in itertools.product(*AXES)]
    chosen = spanning(cases)
    assert set().union(*(cases[i] for i in chosen)) == set().union(*cases) and len(chosen) == 7
    assert [spanning([one]) for one in cases[:2]] == [[0], [0]] and spanning([]) == []
    for i in chosen:  # each is there for a value of its own
        assert set().union(*(cases[j] for j in chosen if j != i)) < set().union(*cases)


def test_all_values_of_the_other_axes_meet_a_long_one():
    """Its values do not all stand beside the first ones of the others."""
    cases = [frozenset(enumerate(values)) for values in itertools.product(*AXES)]
    seen = [sum((1, other) in cases[i] for i in spanning(cases)) for other in "ab"]
    assert max(seen) - min(seen) <= 1


def test_a_list_is_one_axis_and_named_parameters_are_axes_of_their_own():
    together, apart = fast(items()), fast(items("a", "b"))
    assert len(together) == 5 and {(one["a"], one["b"]) for one in together} == set(itertools.product("xy", "uv"))
    pairs = fast(items(("a", "size")))
    assert len(pairs) == 10 and {one["b"] for one in pairs} == set("uv")
    for name, all_of_them in (("a", "xy"), ("b", "uv")):
        assert {one[name] for one in apart} == set(all_of_them)


def test_what_is_slow_already_counts_for_nothing_and_stays():
    found = items("a", slow=range(10, 20))
    assert {one["a"] for one in fast(found)} == {"x"}
    assert not set(left_to_the_slow(found)) & set(found[10:])


def test_tests_are_thinned_each_by_itself_and_a_case_alone_runs():
    one, other = items(), items(name="test_other")
    assert len(fast(one + other)) == 2 * len(fast(one))
    assert [fast([case]) for case in items()] == [[case.params] for case in items()]


def test_a_name_that_is_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"spanning names \['c'\], which are no parameters"):
        left_to_the_slow(items("a", "c"))
