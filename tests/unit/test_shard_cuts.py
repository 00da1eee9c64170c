"""Where shards end."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from schemas.shards import Cut, cut_shards


@st.composite
def row_groups(draw: st.DrawFn) -> list[list[int]]:
    """The documents' positions in each row group of a file; some rows are no documents."""
    groups, start = [], 0
    for size in draw(st.lists(st.integers(0, 40), max_size=8)):
        groups.append([row for row in range(start, start + size) if draw(st.booleans())])
        start += size
    return groups


@given(row_groups(), st.integers(1, 30))
def test_every_document_is_in_exactly_one_shard_and_none_is_too_large(groups: list[list[int]], most: int) -> None:
    cuts = list(cut_shards(groups, most))
    documents = [row for group in groups for row in group]
    for cut in cuts:
        inside = [row for row in documents if cut.first_row <= row < cut.first_row + cut.row_count]
        assert 1 <= len(inside) == cut.document_count <= most
        assert (inside[0], inside[-1]) == (cut.first_row, cut.first_row + cut.row_count - 1)
    assert sum(cut.document_count for cut in cuts) == len(documents)
    assert all(a.first_row + a.row_count <= b.first_row for a, b in pairwise(cuts))


def test_small_row_groups_are_put_together_whole() -> None:
    assert list(cut_shards([range(0, 3), range(3, 6), range(6, 9)], 7)) == [Cut(0, 6, 6), Cut(6, 3, 3)]


def test_a_large_row_group_is_cut_into_equal_parts() -> None:
    assert list(cut_shards([range(0, 11)], 10)) == [Cut(0, 5, 5), Cut(5, 6, 6)]
