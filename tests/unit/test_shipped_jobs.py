"""The jobs that ship: they load, their prompts are worth caching, and the examples in them are answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sandbox.tokens import load as load_tokenizer
from schemas.answers import AnswerRejected
from tasks.jobs import list_jobs, load_job, write_new_job

ROOT = Path(__file__).parents[2]
JOBS = list_jobs(ROOT)


def test_the_two_jobs_ship() -> None:
    assert {"licences", "obligations"} <= set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_shipped_job_is_valid_and_can_be_measured(name: str) -> None:
    job = load_job(name, ROOT)
    assert job.measure == job.input.label == "category"


@pytest.mark.parametrize("name", JOBS)
def test_a_shared_prefix_is_long_enough_to_be_cached(name: str) -> None:
    """Hits are multiples of 128 tokens, and a prefix under some 1,100 saves little (design: deepseek.md)."""
    prefix = load_job(name, ROOT).prefix
    assert len(load_tokenizer().encode(prefix, add_special_tokens=False).ids) >= 1_100


@pytest.mark.parametrize("name", JOBS)
def test_every_example_in_a_prompt_is_an_answer(name: str) -> None:
    job = load_job(name, ROOT)
    examples = [found[0] for found in re.finditer(r"^\{\".*?\}$", job.prompt, re.MULTILINE | re.DOTALL)]
    assert len(examples) >= 2
    for example in examples:
        assert job.answer.check(example, "example", job.prompt)


def test_the_examples_of_a_new_job_are_answers(tmp_path: Path) -> None:
    write_new_job("tickets", tmp_path)
    job = load_job("tickets", tmp_path)
    examples = re.findall(r"^\{\".*\}$", job.prompt, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        job.answer.check(example, "example", "")


def test_an_obligation_must_be_quoted_from_the_licence() -> None:
    answer = load_job("obligations", ROOT).answer
    said = {"kind": "keep_notice", "quote": "Copies must retain this notice."}
    terms = {"name": "X", "owner": None, "spdx_key": None, "category": "Permissive", "obligations": [said]}
    assert answer.check(json.dumps(terms), "x", "Copies must\n   retain this notice.")["obligations"] == [said]
    with pytest.raises(AnswerRejected, match="quote 0 does not occur in the document"):
        answer.check(json.dumps(terms), "x", "Copies should retain this notice.")
