"""Connected components are those that a plain search finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from snpc.graph.union_find import connected_components, number_components

COUNT = 12
edges = st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), max_size=20)


def reachable(start: int, pairs: list[tuple[int, int]]) -> set[int]:
    """Everything that a chain of pairs connects with ``start``, by repeated search."""
    component = {start}
    while True:
        neighbors = {b for a, b in pairs if a in component} | {a for a, b in pairs if b in component}
        if neighbors <= component:
            return component
        component |= neighbors


@given(edges, st.integers(1, 4))
def test_each_member_is_named_by_the_smallest_one_that_it_is_connected_with(pairs, parts):
    chunks = [np.array(pairs[k::parts], np.int64).reshape(-1, 2) for k in range(parts)]
    smallest = connected_components(COUNT, [(chunk[:, 0], chunk[:, 1]) for chunk in chunks])
    assert smallest.tolist() == [min(reachable(k, pairs)) for k in range(COUNT)]


def test_without_pairs_every_member_is_alone():
    assert connected_components(3, []).tolist() == [0, 1, 2]
    assert connected_components(0, []).tolist() == []


@given(edges)
def test_members_have_the_same_number_exactly_if_they_are_connected(pairs):
    names = [f"value_{k}" for k in range(COUNT)]
    numbers = number_components(names, [(names[a], names[b]) for a, b in pairs])
    for k, name in enumerate(names):
        same = {other for other in range(COUNT) if numbers[names[other]] == numbers[name]}
        assert same == reachable(k, pairs)


def test_a_member_that_occurs_twice_is_numbered_once():
    assert number_components(["b", "a", "b"], []) == {"b": 0, "a": 1}
