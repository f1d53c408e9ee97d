"""Groups of rows that are similar, directly or through others."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.dedupe.clusters import ROOTS, UnionFind

ROWS_OF_SHARD = (3, 0, 7, 10, 0, 1)
"""Two shards have no rows."""
ALL_ROWS = [
    (shard << 32) + position
    for shard, num_rows in enumerate(ROWS_OF_SHARD)
    for position in range(num_rows)
]
EDGES = st.lists(st.tuples(st.sampled_from(ALL_ROWS), st.sampled_from(ALL_ROWS)), max_size=40)


def roots_of(*chunks: list[tuple[int, int]]) -> dict[int, int]:
    groups = UnionFind(ROWS_OF_SHARD)
    for chunk in chunks:
        groups.join(*(np.array([edge[end] for edge in chunk], np.uint64) for end in (0, 1)))
    table = pa.concat_tables(groups.roots())
    assert table.schema.equals(ROOTS.arrow)
    refs = table["ref"].to_pylist()
    assert refs == sorted(set(refs))
    return dict(zip(refs, table["root"].to_pylist(), strict=True))


def walk(edges: list[tuple[int, int]]) -> dict[int, int]:
    """Find the first row of each row's group by a graph walk."""
    neighbours: dict[int, set[int]] = {}
    for one, other in edges:
        neighbours.setdefault(one, set()).add(other)
        neighbours.setdefault(other, set()).add(one)
    roots: dict[int, int] = {}
    for first in sorted(neighbours):
        waiting = [] if first in roots else [first]
        while waiting:
            row = waiting.pop()
            if row not in roots:
                roots[row] = first
                waiting += neighbours[row]
    return roots


@settings(deadline=None)
@given(edges=EDGES, cut=st.integers(0, 40))
def test_groups_are_those_found_by_walking_from_row_to_row(
    edges: list[tuple[int, int]], cut: int
) -> None:
    assert roots_of(edges[:cut], edges[cut:]) == walk(edges)


@settings(deadline=None)
@given(edges=EDGES, data=st.data())
def test_order_and_direction_of_similarities_make_no_difference(
    edges: list[tuple[int, int]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(edges))
    assert roots_of([(other, one) for one, other in shuffled]) == roots_of(edges)


def test_a_long_chain_is_one_group_whichever_end_it_is_joined_from() -> None:
    chain = list(pairwise(ALL_ROWS))
    expected = dict.fromkeys(ALL_ROWS, ALL_ROWS[0])
    assert roots_of(*([edge] for edge in chain)) == expected
    assert roots_of(*([edge] for edge in reversed(chain))) == expected
    assert roots_of(chain) == expected
