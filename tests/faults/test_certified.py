"""Runs with a promise: killed in any phase they go on with the same sample, and reach the same certificate."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest

from sandbox.bill import bill_path
from sandbox.postgres import Server, create_database, drop_database
from tasks.ledger.leases import LeaseTimes
from tests.faults.checker import check
from tests.faults.stage import KILLED, Stage, staged
from tests.faults.summary import Tally

DOCUMENTS = 40
#: Easily kept, so that of so few documents some are drawn and some are accepted.
PROMISE = "{target: 0.6, delta: 0.2}"
#: What may not change any more once it is there.
ORDER = """
    SELECT f.order_digest || encode(f.seed, 'hex') || (
        SELECT string_agg(document_no || ':' || is_sampled, ' ' ORDER BY rank) FROM ranked WHERE run_id = f.run_id)
    FROM frozen_order f WHERE run_id = (SELECT max(run_id) FROM run)
"""
CERTIFICATE = "SELECT certified::text FROM certified WHERE run_id = (SELECT max(run_id) FROM run)"
SENT = """
    SELECT count(*) FROM attempt_intent WHERE reason = 'certified_sample' AND run_id = (SELECT max(run_id) FROM run)
"""
#: Where, at which hit, and whether an order and a certificate are there by then. A run sends 40 and more first, and
#: has eight shards.
DEATHS = [
    ("send.after:20", False, False),
    ("finish.after_commit:3", False, False),
    ("freeze.before_commit", False, False),
    ("freeze.after_commit", True, False),
    ("send.after:46", True, False),
    ("certify.before_commit", True, False),
    ("certify.after_commit", True, True),
]


@pytest.fixture(scope="module")
def stage(postgres: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("certified")
    name = f"certified_{uuid.uuid4().hex}"
    with staged(root, create_database(postgres, name, template=template), documents=DOCUMENTS) as made:
        made.times = LeaseTimes(beat_every_s=0.1, grace_s=0.3)  # the killed are buried at once
        made.change_job(escalate=PROMISE)
        yield made
    drop_database(postgres, name)


@pytest.mark.parametrize(("point", "has_order", "has_certificate"), DEATHS)
def test_killed_in_any_phase_a_run_goes_on_with_its_sample_and_its_certificate(
    point: str, has_order: bool, has_certificate: bool, stage: Stage, tally: Tally
) -> None:
    stage.scene()
    assert stage.run(failpoint=point) == KILLED, stage.told()
    order, certificate, earlier = stage.value(ORDER), stage.value(CERTIFICATE), stage.snapshot()
    assert (order is not None, certificate is not None) == (has_order, has_certificate)
    assert has_order or not stage.value(SENT)
    stage.resume()
    assert order in (None, stage.value(ORDER))
    assert certificate in (None, stage.value(CERTIFICATE))
    assert stage.violations(earlier) == [], stage.told()
    tally.count("killed in a certified run")


def test_of_two_starts_at_once_exactly_one_freezes_and_one_certifies(stage: Stage) -> None:
    stage.scene()
    stage.starts = 2
    try:
        codes = [stage.wait(child) for child in [stage.start(), stage.start()]]
        assert set(codes) <= {0, 3}, stage.told()
        stage.resume()
        assert stage.violations() == [], stage.told()
    finally:
        stage.starts = 1
    told = "SELECT string_agg(kind, ' ' ORDER BY event_id) FROM run_event WHERE kind IN ('frozen', 'certified')"
    assert stage.value(f"{told} AND run_id = {stage.run_id}") == "frozen certified"


#: What breaks the promise behind every trigger's back, and what the checker says to it.
PLANTED = {
    "UPDATE certified SET cut = cut + 1": "and is cut at",
    "UPDATE frozen_order SET allowance = allowance + 1": "passes",
    "UPDATE held SET confidence = 1 - confidence": "its order is not that of its confidences",
    """UPDATE ranked k SET is_sampled = NOT is_sampled FROM (
           SELECT run_id, min(rank) FILTER (WHERE is_sampled) AS one,
                  min(rank) FILTER (WHERE NOT is_sampled) AS other
           FROM ranked GROUP BY run_id) x
       WHERE k.run_id = x.run_id AND k.rank IN (x.one, x.other)""": "were to be drawn",
    "UPDATE frozen_order SET documents = documents + 100, piloted = piloted + 100": "without a place have",
    "UPDATE frozen_order SET frozen_at = now()": "climbed before the order was frozen",
    "DELETE FROM ranked WHERE rank = 5": "its ranks are not",
    """UPDATE document SET tier = 'flash' WHERE document_no = (
           SELECT document_no FROM ranked WHERE is_sampled AND run_id = document.run_id LIMIT 1)""": "nothing allows",
    "DELETE FROM frozen_order": "no order holds it",  # the last: without one there is nothing else to say
}


def test_the_checker_names_a_broken_promise(stage: Stage) -> None:
    stage.scene()
    stage.resume()
    for statement, named in PLANTED.items():
        with psycopg.connect(
            stage.database_url, options="-c search_path=farthing -c session_replication_role=replica"
        ) as connection:
            connection.execute(statement)
            connection.commit()
            found = [str(broken) for broken in check(stage.database_url, bill_path(stage.root))]
            assert any(broken.startswith("I15") and named in broken for broken in found), (statement, found[:5])
