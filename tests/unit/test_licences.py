"""The demo's documents: complete, labelled, the same on every machine, and matched by their answer keys."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sandbox import licences
from sandbox.answer_keys import CATEGORIES, Licence, find_obligations, obligations_line
from sandbox.licences import Corpus, _write_parquet, read_licences, write_corpus
from schemas.answers import AnswerRejected
from tasks.jobs import load_job

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Written once for all workers of this run: the first one writes, the others wait and find it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "licences.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return write_corpus(shared / "licences")


@pytest.fixture(scope="module")
def rows(corpus: Corpus) -> list[dict[str, Any]]:
    return [row for file in corpus.files for row in pq.read_table(file).to_pylist()]


def read_key(corpus: Corpus, job: str) -> dict[str, dict[str, Any]]:
    lines = corpus.answer_key(job).read_text(encoding="utf-8").splitlines()
    return {line["sha256"]: line for line in map(json.loads, lines)}


def digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(row["text"].encode()).hexdigest()


def test_two_thousand_licences_in_eleven_categories(corpus: Corpus, rows: list[dict[str, Any]]) -> None:
    assert len(rows) == corpus.documents >= 2_000
    assert {row["category"] for row in rows} == set(CATEGORIES)
    assert len(CATEGORIES) == 11


def test_ids_and_texts_are_unique_and_no_text_is_blank(rows: list[dict[str, Any]]) -> None:
    assert len({row["licence_key"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    assert all(row["text"].strip() for row in rows)
    assert all(row["words"] == len(row["text"].split()) for row in rows)


def test_a_well_known_licence_is_as_its_authors_wrote_it(rows: list[dict[str, Any]]) -> None:
    (mit,) = [row for row in rows if row["licence_key"] == "mit"]
    assert (mit["spdx"], mit["category"], mit["name"]) == ("MIT", "Permissive", "MIT License")
    assert mit["text"].startswith("Permission is hereby granted, free of charge")


def test_the_first_documents_are_a_fair_sample(rows: list[dict[str, Any]]) -> None:
    assert len({row["licence_key"][0] for row in rows[:100]}) > 12
    assert len({row["category"] for row in rows[:100]}) >= 6


def test_files_are_several_with_small_row_groups(corpus: Corpus) -> None:
    assert len(corpus.files) > 1
    for file in corpus.files:
        about = pq.ParquetFile(file).metadata
        assert about.num_row_groups > 1
        assert about.row_group(0).num_rows == 200


def test_the_same_licences_make_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    again = list(read_licences())
    for number, file in enumerate(corpus.files):
        _write_parquet(tmp_path / file.name, again[number :: len(corpus.files)])
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_writing_again_changes_nothing(corpus: Corpus) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}
    assert write_corpus(corpus.folder) == corpus
    assert {path: path.stat().st_mtime_ns for path in corpus.folder.iterdir()} == before


def test_of_two_processes_at_once_only_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds no stamp, waits for its turn, and then finds the first one's documents."""
    monkeypatch.setattr(licences, "read_licences", lambda: islice(read_licences(), 10))
    first: list[Corpus] = []

    def look(folder: Path, source: str) -> Corpus | None:
        seen = read_stamp(folder, source)
        if not first:
            first.append(Corpus(folder, 0, ""))  # from here on stamps are read as they are
            first[:] = [write_corpus(folder)]
            mtimes.update({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})
        return seen

    mtimes: dict[str, int] = {}
    read_stamp = licences._read_stamp
    monkeypatch.setattr(licences, "_read_stamp", look)
    assert write_corpus(tmp_path) == first[0]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == mtimes


def test_the_source_and_its_licence_lie_beside_the_documents(corpus: Corpus) -> None:
    note = (corpus.folder / "LICENSE.txt").read_text(encoding="utf-8")
    assert "CC-BY-4.0" in note
    assert "licensedcode-data 32.1.0" in note
    assert "SIMULATED" in note


@pytest.mark.parametrize("job_name", ["licences", "obligations"])
def test_the_key_answers_every_document_as_its_job_demands(
    corpus: Corpus, rows: list[dict[str, Any]], job_name: str
) -> None:
    key, job = read_key(corpus, job_name), load_job(job_name, ROOT)
    assert len(key) == len(rows)
    for row in rows:
        line = key[digest(row)]
        found = job.answer.check(json.dumps(line["answer"]), row["licence_key"], row["text"])
        assert found["category"] == row["category"]
        assert 0 <= line["hard"] <= 1
        assert line["answer"] not in line["wrong"]


def test_a_wrong_category_is_valid_and_not_the_experts(corpus: Corpus, rows: list[dict[str, Any]]) -> None:
    key, job = read_key(corpus, "licences"), load_job("licences", ROOT)
    for row in rows:
        for wrong in key[digest(row)]["wrong"]:
            assert job.answer.check(json.dumps(wrong), row["licence_key"], row["text"])["category"] != row["category"]


def test_wrong_obligations_fail_validation_in_two_of_three_ways(corpus: Corpus, rows: list[dict[str, Any]]) -> None:
    key, job = read_key(corpus, "obligations"), load_job("obligations", ROOT)
    for row in rows:
        mistaken, ungrounded, incomplete = key[digest(row)]["wrong"]
        assert job.answer.check(json.dumps(mistaken), row["licence_key"], row["text"])
        with pytest.raises(AnswerRejected, match="does not occur in the document"):
            job.answer.check(json.dumps(ungrounded), row["licence_key"], row["text"])
        with pytest.raises(AnswerRejected, match="category"):
            job.answer.check(json.dumps(incomplete), row["licence_key"], row["text"])


def test_obligations_are_binding_sentences_with_their_kind() -> None:
    text = (
        "You may copy it.\nYou must keep the copyright notice in all copies. It works. You may not sell any copies."
    )
    assert find_obligations(text) == [
        {"kind": "keep_notice", "quote": "You must keep the copyright notice in all copies."},
        {"kind": "no_distribution", "quote": "You may not sell any copies."},
    ]


def test_a_licence_without_obligations_has_an_invented_one_as_its_wrong_answer() -> None:
    line = obligations_line(Licence("x", "No rights reserved.", "Public Domain", "X", None, None))
    answer, wrong = line["answer"], line["wrong"]
    assert isinstance(answer, dict)
    assert isinstance(wrong, list)
    assert answer["obligations"] == []
    assert len(wrong[1]["obligations"]) == 1
