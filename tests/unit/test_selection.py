"""Which files a pattern and the named partitions select."""

from typing import Any

import pytest

from schemas.errors import ConfigurationError
from schemas.requests import spell_command
from schemas.selection import (
    choose_partitions,
    depth_below,
    fixed_folder,
    hive_values,
    matches,
    name_partitions,
    select_partitions,
)

DAYS = ["t/day=2026-01-01/a.parquet", "t/day=2026-01-01/b.parquet", "t/day=2026-01-02/a.parquet"]


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("a/b.parquet", "a/*.parquet"),
        ("a/b.parquet", "a/**/*.parquet"),
        ("a/x/y/b.parquet", "a/**/*.parquet"),
        ("b.parquet", "**/*.parquet"),
        ("a/day=1/b.parquet", "a/day=?/[a-c].parquet"),
        ("../a/b.parquet", "../a/*.parquet"),
        ("a/_day=1/b.parquet", "a/**/b.parquet"),
        ("a/_b.parquet", "a/_*.parquet"),
        ("a/x/b", "a/**/**/b"),
    ],
)
def test_pattern_matches(path: str, pattern: str) -> None:
    assert matches(path, pattern)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("a/x/b.parquet", "a/*.parquet"),
        ("a/b.parquet.crc", "a/*.parquet"),
        ("a/_delta_log/1.parquet", "a/**/*.parquet"),
        ("a/.b.parquet", "a/*.parquet"),
        ("a/_SUCCESS", "a/*"),
        ("a/B.parquet", "a/b.parquet"),
        ("a", "a/**/b"),
        ("a/b/c", "a/b"),
    ],
)
def test_pattern_does_not_match(path: str, pattern: str) -> None:
    assert not matches(path, pattern)


@pytest.mark.parametrize(
    ("pattern", "folder", "depth"),
    [
        ("a/b/*.parquet", "a/b", 0),
        ("a/*/c.parquet", "a", 1),
        ("a/**/c.parquet", "a", None),
        ("*.parquet", "", 0),
        ("/*.parquet", "/", 0),
        ("/a/*/*/x", "/a", 2),
        ("a/b.parquet", "a", 0),
    ],
)
def test_search_begins_at_the_fixed_folder(pattern: str, folder: str, depth: int | None) -> None:
    assert (fixed_folder(pattern), depth_below(pattern)) == (folder, depth)


def test_hive_values_are_unescaped_and_the_file_name_is_no_folder() -> None:
    assert hive_values("t/day=2026/city=Z%C3%BCrich%20%2/x=1.parquet") == {"day": "2026", "city": "Zürich %2"}


@pytest.mark.parametrize("wanted", ["2026-01-01", "day=2026-01-01"])
def test_a_partition_is_named_by_value_or_by_folder(wanted: str) -> None:
    assert select_partitions(DAYS, "day", [wanted]) == DAYS[:2]


def test_no_partition_named_means_all_of_them() -> None:
    assert select_partitions(DAYS, "day", []) == DAYS


def test_without_a_key_a_file_is_a_partition() -> None:
    assert select_partitions(["x/a.parquet", "x/b.parquet"], None, ["b.parquet"]) == ["x/b.parquet"]
    assert select_partitions(["x/a.parquet", "x/b.parquet"], None, ["x/a.parquet"]) == ["x/a.parquet"]


def test_every_unknown_partition_is_named_with_what_was_meant() -> None:
    with pytest.raises(ConfigurationError) as caught:
        select_partitions(DAYS, "day", ["2026-01-03", "2026-01-01", "x"])
    assert len(caught.value.problems) == 2
    assert "'2026-01-03' is not in the input; did you mean 2026-01-0" in str(caught.value)
    assert "'x' is not in the input; There is: 2026-01-01, 2026-01-02" in str(caught.value)


FILES = ["t/2026-01-01.parquet", "t/2026-01-02.parquet", "t/x/2026-01-02.parquet"]
CHOICES = [
    (DAYS, "day", {}, ["2026-01-01", "2026-01-02"]),
    (DAYS, "day", {"first": "2026-01-02"}, ["2026-01-02"]),
    (DAYS, "day", {"last": "2026-01-01"}, ["2026-01-01"]),
    (DAYS, "day", {"first": "2026-01-01", "last": "2026-01-02"}, ["2026-01-01", "2026-01-02"]),
    (DAYS, "day", {"wanted": ["day=2026-01-02"]}, ["2026-01-02"]),
    (DAYS, "day", {"wanted": ["2026-01-0?"], "last": "2026-01-01"}, ["2026-01-01"]),
    (["t/lot=b/x", "t/lot=c/x", "t/lot=d/x"], "lot", {"first": "bb", "last": "c"}, ["c"]),
    (FILES, None, {"last": "2026-01-01"}, FILES[:1]),
    (FILES, None, {"first": "2026-01-02"}, FILES[1:]),
    (FILES, None, {"wanted": ["2026-01-02.parquet"]}, FILES[1:]),
    (FILES, None, {"wanted": ["t/x/*"]}, FILES[2:]),
]
ALL: dict[str, Any] = {"wanted": (), "first": None, "last": None}


@pytest.mark.parametrize(("paths", "key", "asked", "chosen"), CHOICES)
def test_partitions_are_chosen_by_name_glob_and_bounds(
    paths: list[str], key: str | None, asked: dict[str, Any], chosen: list[str]
) -> None:
    assert choose_partitions(paths, key, **ALL | asked) == chosen


@pytest.mark.parametrize(
    ("paths", "key", "asked", "words"),
    [
        (DAYS, "day", {"wanted": ["2026-01-03"]}, "'2026-01-03' is not in the input; did you mean 2026-01-0"),
        (DAYS, "day", {"wanted": ["2027-*"]}, r"'2027-\*' is not in the input"),
        (DAYS, "day", {"first": "1 January"}, "'1 January' is not a date; write it like 2026-01-31"),
        (DAYS, "day", {"first": "2026-02-01"}, "none is from 2026-02-01; .*There is: 2026-01-01, 2026-01-02"),
        (["t/lot=b/x", "t/lot=c/x"], "lot", {"first": "2026-01-01"}, "reads as a date, but partitions .* like b;"),
        (DAYS, "day", {"first": "2026-01-02", "last": "2026-01-01"}, "comes after 2026-01-01"),
        (["t/a.parquet", *DAYS], "day", {}, "t/a.parquet: is in no folder day=…"),
    ],
)
def test_what_chooses_no_partition_is_refused(
    paths: list[str], key: str | None, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        choose_partitions(paths, key, **ALL | asked)


def test_a_whole_path_means_that_file_alone() -> None:
    paths = ["a.parquet", "x/a.parquet"]
    assert select_partitions(paths, None, ["a.parquet"]) == ["a.parquet"]
    assert name_partitions(paths, None) == {path: path for path in paths}


@pytest.mark.parametrize(
    ("selection", "simulated", "command"),
    [
        ({"partitions": [], "limit": None}, False, "farthing run colours"),
        ({"partitions": [], "limit": 3000}, True, "farthing run colours --limit 3000 --sandbox"),
        (
            {"partitions": ["a day", "b"], "limit": None},
            False,
            "farthing run colours --partition 'a day' --partition b",
        ),
        ({"sample": 50}, False, "farthing estimate colours --sample 50"),
        ({"sample": 200, "pilot": True}, False, "farthing calibrate colours --sample 200"),
        ({"sample": 200, "variant": "b.md"}, False, "farthing compare colours --variant b.md --sample 200"),
        ({"sample": 200, "variant": None}, False, "farthing compare colours --variant FILE --sample 200"),
    ],
)
def test_a_run_is_resumed_by_the_command_that_selects_the_same(
    selection: dict[str, Any], simulated: bool, command: str
) -> None:
    assert spell_command("colours", selection, is_simulated=simulated) == command
