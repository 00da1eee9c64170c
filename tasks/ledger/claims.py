"""The claims: each guarantee that rows can bear out, as the SQL that names the rows which break it.

Parameters: `run_id`, `is_done`, and the few constants of `schemas` that `tasks.ledger.proof` binds. A query returns
one column, words that name a row by its key (`run.document.attempt`) and say what is wrong with it.

Postgres's wall clock may be set back, so a row was written after another only where both its instant and its
transaction's number (`xmin`; a newer one has the smaller `age`) say so. In a ledger restored from a dump the numbers
are those of the restore: there such an order may go unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.ladder import UNKNOWN_RETRIES

#: A result counts as committed so long after its row was written: a row's instant is older than its commit.
COMMIT_SLACK_S = 30.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A guarantee as SQL: what it says, a count of the rows it is about, and queries for those that break it."""

    says: str
    counted: str
    broken: tuple[str, ...]


CLAIMS: Mapping[str, Claim] = {
    "G1": Claim(
        "the manifest's digest is the recorded one, and the shards cut its rows without gap or overlap",
        "SELECT count(*) FROM shard WHERE run_id = :run_id",
        (
            """
            SELECT format('shard %s.%s: starts at document %s, not at %s', run_id, shard_no, first_document_no, due)
            FROM (SELECT *, coalesce(sum(document_count) OVER (ORDER BY shard_no ROWS BETWEEN UNBOUNDED PRECEDING
                                                               AND 1 PRECEDING), 0) AS due
                  FROM shard WHERE run_id = :run_id) s
            WHERE first_document_no <> due OR document_count < 1 OR row_count < document_count
            """,
            """
            SELECT format('shard %s.%s: row %s was cut before', run_id, shard_no, first_row)
            FROM (SELECT *, lag(first_row + row_count, 1, 0::bigint) OVER (PARTITION BY file_no ORDER BY shard_no)
                            AS end_before
                  FROM shard WHERE run_id = :run_id) s
            WHERE first_row < end_before
            """,
            """
            SELECT format('input_file %s.%s: %s rows, but its shards have %s', f.run_id, f.file_no, f.rows,
                          coalesce(s.documents, 0))
            FROM input_file f
            LEFT JOIN (SELECT file_no, sum(document_count) AS documents FROM shard WHERE run_id = :run_id
                       GROUP BY file_no) s USING (file_no)
            WHERE f.run_id = :run_id AND f.rows <> coalesce(s.documents, 0)
            """,
            """
            SELECT format('run %s: %s documents, but its shards have %s', r.run_id, r.documents, s.documents)
            FROM run r, (SELECT coalesce(sum(document_count), 0) AS documents FROM shard WHERE run_id = :run_id) s
            WHERE r.run_id = :run_id AND r.documents <> s.documents
            """,
        ),
    ),
    "G2": Claim(
        "every document of a finished shard has one terminal row, every terminal row is a document's, and what it "
        "rests on exists",
        "SELECT count(*) FROM document WHERE run_id = :run_id",
        (
            """
            SELECT format('document %s.%s: has no terminal row, and its shard %s is %s', s.run_id, n, s.shard_no,
                          s.state)
            FROM shard s
            CROSS JOIN LATERAL (SELECT count(*) AS ended FROM document d WHERE d.run_id = s.run_id
                AND d.document_no BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1) e
            CROSS JOIN LATERAL generate_series(s.first_document_no, s.first_document_no + s.document_count - 1) n
            WHERE s.run_id = :run_id AND (s.state IN ('done', 'failed') OR :is_done) AND e.ended < s.document_count
              AND NOT EXISTS (SELECT FROM document d WHERE d.run_id = s.run_id AND d.document_no = n)
            """,
            """
            SELECT format('document %s.%s: is outside of the run', d.run_id, d.document_no)
            FROM document d JOIN run r USING (run_id)
            WHERE d.run_id = :run_id AND (d.document_no < 0 OR d.document_no >= r.documents)
            """,
            """
            SELECT format('shard %s.%s: still %s although the run is done', run_id, shard_no, state)
            FROM shard WHERE run_id = :run_id AND :is_done AND state NOT IN ('done', 'failed')
            """,
            """
            SELECT format('document %s.%s: its result names attempt %s at %s, which accepted nothing', d.run_id,
                          d.document_no, d.attempt_no, d.tier)
            FROM document d
            LEFT JOIN attempt_intent i USING (run_id, document_no, attempt_no)
            LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
            WHERE d.run_id = :run_id AND d.state = 'result'
              AND (i.tier IS DISTINCT FROM d.tier OR o.verdict IS DISTINCT FROM 'accepted' AND NOT (
                  o.verdict IS NOT DISTINCT FROM 'held' AND EXISTS (
                      SELECT FROM ranked k JOIN certified c USING (run_id) WHERE k.run_id = d.run_id
                      AND k.document_no = d.document_no AND k.rank < c.cut AND NOT k.is_sampled)))
            """,
            """
            SELECT format('document %s.%s: reuses %s.%s, which is no result of the same prompt and text', d.run_id,
                          d.document_no, d.of_run_id, d.of_document_no)
            FROM document d
            JOIN run r USING (run_id)
            LEFT JOIN document s ON s.run_id = d.of_run_id AND s.document_no = d.of_document_no
            LEFT JOIN run e ON e.run_id = s.run_id
            WHERE d.run_id = :run_id AND d.state = 'reused'
              AND (s.state IS DISTINCT FROM 'result' OR s.text_digest IS DISTINCT FROM d.text_digest
                   OR e.prompt_version <> r.prompt_version OR e.is_simulated <> r.is_simulated
                   OR (r.reuses ->> s.tier IS NOT NULL AND NOT EXISTS (
                       SELECT FROM attempt_outcome m WHERE m.run_id = s.run_id AND m.document_no = s.document_no
                       AND m.attempt_no = s.attempt_no AND m.served_model = r.reuses ->> s.tier)))
            """,
            """
            SELECT format('document %s.%s: ended as a duplicate of %s, and the manifest says otherwise', d.run_id,
                          d.document_no, d.of_document_no)
            FROM document d LEFT JOIN duplicate m USING (run_id, document_no)
            WHERE d.run_id = :run_id AND d.state = 'duplicate'
              AND (m.of_document_no IS DISTINCT FROM d.of_document_no OR m.of_document_no >= d.document_no)
            """,
        ),
    ),
    "G4": Claim(
        "every outcome, unknown and stored answer has the intent that came before it",
        "SELECT count(*) FROM attempt_outcome WHERE run_id = :run_id",
        tuple(
            f"""
            SELECT format('{table} %s.%s.%s: has no intent', x.run_id, x.document_no, x.attempt_no)
            FROM {table} x WHERE x.run_id = :run_id
              AND NOT EXISTS (SELECT FROM attempt_intent i WHERE i.run_id = x.run_id
                              AND i.document_no = x.document_no AND i.attempt_no = x.attempt_no)
            """  # noqa: S608 (names of our own tables)
            for table in ("attempt_outcome", "attempt_unknown", "answer")
        ),
    ),
    "G5": Claim(
        "nothing was intended for a document that had ended, or for a text with a committed result of the same "
        f"prompt version (written {COMMIT_SLACK_S:.0f} s before), and no document has two results",
        "SELECT count(*) FROM attempt_intent WHERE run_id = :run_id",
        (
            """
            SELECT format('attempt_intent %s.%s.%s: intended after its document had ended', i.run_id, i.document_no,
                          i.attempt_no)
            FROM attempt_intent i JOIN document d USING (run_id, document_no)
            WHERE i.run_id = :run_id AND i.intended_at > d.recorded_at AND age(i.xmin) <= age(d.xmin)
            """,
            """
            SELECT format('document %s.%s: %s of its answers were accepted', run_id, document_no, count(*))
            FROM attempt_outcome o
            WHERE run_id = :run_id AND verdict = 'accepted'
              AND NOT EXISTS (SELECT FROM attempt_unknown u WHERE u.run_id = o.run_id
                              AND u.document_no = o.document_no AND u.attempt_no = o.attempt_no)
            GROUP BY run_id, document_no HAVING count(*) > 1
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: the result %s.%s was committed before', i.run_id, i.document_no,
                          i.attempt_no, s.run_id, s.document_no)
            FROM attempt_intent i
            JOIN run r USING (run_id)
            JOIN document d USING (run_id, document_no)
            JOIN document s ON s.text_digest = d.text_digest AND s.state = 'result' AND s.answer IS NOT NULL
            JOIN run e ON e.run_id = s.run_id
            WHERE i.run_id = :run_id AND i.attempt_no = 1
              AND (s.run_id, s.document_no) <> (d.run_id, d.document_no)
              AND e.prompt_version = r.prompt_version AND e.is_simulated = r.is_simulated
              AND (s.tier = r.policy -> 'ladder' ->> -1
                   OR r.policy -> 'escalate' ->> 'below' IS NOT NULL AND (
                       s.confidence IS NULL
                       OR s.confidence >= (r.policy -> 'escalate' ->> 'below')::double precision))
              AND (r.reuses ->> s.tier IS NULL OR EXISTS (
                  SELECT FROM attempt_outcome m WHERE m.run_id = s.run_id AND m.document_no = s.document_no
                  AND m.attempt_no = s.attempt_no AND m.served_model = r.reuses ->> s.tier))
              AND s.recorded_at < i.intended_at - make_interval(secs => :commit_slack)
              AND age(s.xmin) >= age(i.xmin)
            """,
        ),
    ),
    "G6": Claim(
        f"no document was tried more than {UNKNOWN_RETRIES} times after attempts that may have been billed, and none "
        "had two attempts at once",
        "SELECT count(*) FROM attempt_intent WHERE run_id = :run_id",
        (
            """
            SELECT format('document %s.%s: %s attempts may have been billed and brought nothing', run_id, document_no,
                          count(*))
            FROM attempt_intent i LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
            WHERE run_id = :run_id AND (o.signal IS NULL OR o.signal = ANY(:unknown_billing))
            GROUP BY run_id, document_no HAVING count(*) > :unknown_attempts
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: intended before attempt %s was over', run_id, document_no,
                          attempt_no, before_no)
            FROM (SELECT run_id, document_no, attempt_no, intended_at, age(i.xmin) AS intended_ago,
                         lag(attempt_no) OVER w AS before_no,
                         lag(least(o.recorded_at, u.declared_at)) OVER w AS over_at,
                         lag(greatest(age(o.xmin), age(u.xmin))) OVER w AS over_ago
                  FROM attempt_intent i
                  LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
                  LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
                  WHERE run_id = :run_id
                  WINDOW w AS (PARTITION BY run_id, document_no ORDER BY attempt_no)) a
            WHERE before_no IS NOT NULL
              AND (over_at IS NULL OR (over_at > intended_at AND over_ago <= intended_ago))
            """,
        ),
    ),
    "G7": Claim(
        "every known cost is its tokens times the price row of its instant, the price rows are the price book's, and "
        "what an export closed was unknown and costs no more than its bound",
        "SELECT count(*) FROM attempt_outcome WHERE run_id = :run_id AND cost IS NOT NULL",
        (
            """
            SELECT format('attempt_outcome %s.%s.%s: cost %s is not %s hit, %s miss and %s output tokens at %s',
                          o.run_id, o.document_no, o.attempt_no, o.cost, o.hit, o.miss, o.output, p.name)
            FROM attempt_outcome o LEFT JOIN price p USING (price_id)
            WHERE o.run_id = :run_id AND o.price_id IS NOT NULL
              AND o.cost IS DISTINCT FROM o.hit::numeric * p.hit_pico + o.miss::numeric * p.miss_pico
                                          + o.output::numeric * p.output_pico
            """,
            """
            SELECT format('attempt_outcome %s.%s.%s: cost %s after %s without usage or price', o.run_id,
                          o.document_no, o.attempt_no, o.cost, o.signal)
            FROM attempt_outcome o
            WHERE o.run_id = :run_id AND o.cost IS NOT NULL AND o.price_id IS NULL
              AND (o.cost <> 0 OR o.hit IS NOT NULL OR NOT (o.signal = ANY(:not_billed)))
            """,
            """
            SELECT format('attempt_outcome %s.%s.%s: impossible token counts', o.run_id, o.document_no, o.attempt_no)
            FROM attempt_outcome o
            WHERE o.run_id = :run_id
              AND (o.hit < 0 OR o.miss < 0 OR o.output < 0 OR o.reasoning < 0 OR o.reasoning > o.output
                   OR num_nulls(o.hit, o.miss, o.output) NOT IN (0, 3))
            """,
            """
            SELECT format('attempt_outcome %s.%s.%s: priced in %s, and the run is in %s', o.run_id, o.document_no,
                          o.attempt_no, p.currency, r.currency)
            FROM attempt_outcome o JOIN run r USING (run_id) JOIN price p USING (price_id)
            WHERE o.run_id = :run_id AND p.currency <> r.currency
            """,
            """
            SELECT format('cost_adjustment %s of %s.%s.%s: %s', c.adjustment_id, c.run_id, c.document_no,
                          c.attempt_no,
                          CASE WHEN u.bound IS NULL THEN 'the attempt was never declared unknown'
                               WHEN p.currency IS DISTINCT FROM r.currency THEN 'its price is not in ' || r.currency
                               WHEN c.evidence = '' THEN 'it has no evidence'
                               WHEN c.amount > u.bound THEN format('%s is above the bound of %s', c.amount, u.bound)
                               ELSE format('%s is not %s hit, %s miss and %s output tokens at %s', c.amount, c.hit,
                                           c.miss, c.output, p.name) END)
            FROM cost_adjustment c
            JOIN run r USING (run_id)
            LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
            LEFT JOIN price p USING (price_id)
            WHERE c.run_id = :run_id AND c.attempt_no IS NOT NULL
              AND num_nonnulls(c.price_id, c.hit, c.miss, c.output) > 0
              AND (u.bound IS NULL OR p.currency IS DISTINCT FROM r.currency OR c.evidence = '' OR c.amount > u.bound
                   OR c.amount IS DISTINCT FROM c.hit::numeric * p.hit_pico + c.miss::numeric * p.miss_pico
                                                + c.output::numeric * p.output_pico)
            """,
            """
            SELECT format('cost_adjustment %s of run %s: %s', c.adjustment_id, c.run_id,
                          CASE WHEN p.currency <> r.currency THEN 'its price is not in ' || r.currency
                               WHEN c.evidence = '' THEN 'it has no evidence'
                               ELSE format('%s is not %s hit, %s miss and %s output tokens at %s', c.amount, c.hit,
                                           c.miss, c.output, p.name) END)
            FROM cost_adjustment c
            JOIN run r USING (run_id)
            JOIN price p ON p.price_id = c.corrected_price_id
            WHERE c.run_id = :run_id
              AND (p.currency <> r.currency OR c.evidence = ''
                   OR c.amount IS DISTINCT FROM c.hit::numeric * p.hit_pico + c.miss::numeric * p.miss_pico
                                                + c.output::numeric * p.output_pico)
            """,
        ),
    ),
    "G8": Claim(
        "totals are sums of rows, stored ones too, every attempt has a cost, a bound or is under way, and the lanes "
        "counted right",
        "SELECT count(*) FROM attempt_intent WHERE run_id = :run_id",
        (
            """
            SELECT format('attempt_outcome %s.%s.%s: has neither a cost nor a bound', run_id, document_no, attempt_no)
            FROM unpriced WHERE run_id = :run_id
            """,
            """
            SELECT format('attempt_unknown %s.%s.%s: bound %s is not the %s reserved', u.run_id, u.document_no,
                          u.attempt_no, u.bound, i.reserved)
            FROM attempt_unknown u JOIN attempt_intent i USING (run_id, document_no, attempt_no)
            WHERE u.run_id = :run_id AND u.bound <> i.reserved
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: has no outcome, is not declared unknown, and lane %s has ended',
                          i.run_id, i.document_no, i.attempt_no, i.lane_id)
            FROM attempt_intent i
            LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
            LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
            JOIN lane l ON l.lane_id = i.lane_id
            WHERE i.run_id = :run_id AND o.signal IS NULL AND u.bound IS NULL AND (l.ended_at IS NOT NULL OR :is_done)
            """,
            """
            SELECT format('run_cost %s: says %s attempts, %s known and %s unknown; the rows say %s, %s and %s',
                          c.run_id, c.attempts, c.cost_pico, c.unknown_pico, s.attempts, s.cost, s.bounds)
            FROM run_cost c, (
                SELECT count(*) AS attempts, coalesce(sum(coalesce(o.cost, c.amount)), 0) AS cost,
                       coalesce(sum(coalesce(u.bound, i.reserved))
                                FILTER (WHERE o.cost IS NULL AND c.amount IS NULL), 0) AS bounds
                FROM attempt_intent i
                LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
                LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
                LEFT JOIN (SELECT * FROM cost_adjustment WHERE price_id IS NOT NULL) c
                    USING (run_id, document_no, attempt_no)
                WHERE i.run_id = :run_id
            ) s
            WHERE c.run_id = :run_id
              AND (c.attempts, c.cost_pico, c.unknown_pico) IS DISTINCT FROM (s.attempts, s.cost, s.bounds)
            """,
            """
            SELECT format('tier_cost %s: %s known and %s unknown do not add up to the run''s %s and %s', c.run_id,
                          t.cost_pico, t.unknown_pico, c.cost_pico, c.unknown_pico)
            FROM run_cost c, (SELECT coalesce(sum(cost_pico), 0) AS cost_pico,
                                     coalesce(sum(unknown_pico), 0) AS unknown_pico
                              FROM tier_cost WHERE run_id = :run_id) t
            WHERE c.run_id = :run_id AND (c.cost_pico, c.unknown_pico) IS DISTINCT FROM (t.cost_pico, t.unknown_pico)
            """,
            """
            WITH counted AS MATERIALIZED (
                SELECT s.*, CASE WHEN z.slowest IS NOT NULL THEN w.slowest END AS slowest,
                       CASE WHEN z.waits IS NOT NULL THEN w.waits END AS waits,
                       CASE WHEN z.over_time IS NOT NULL THEN h.over_time END AS over_time,
                       CASE WHEN z.confidences IS NOT NULL THEN h.confidences END AS confidences
                FROM run_sums_by_rows s
                JOIN run_waits_by_rows w USING (run_id)
                JOIN run_shapes_by_rows h USING (run_id)
                JOIN summed z USING (run_id)
                WHERE s.run_id = :run_id AND w.run_id = :run_id AND h.run_id = :run_id AND z.run_id = :run_id)
            SELECT format('run_sums %s: %s is %s; the rows say %s', run_id, key, left(stored.value::text, 200),
                          left(to_jsonb(counted) ->> key, 200))
            FROM summed JOIN counted USING (run_id), jsonb_each(to_jsonb(summed)) stored
            WHERE stored.value IS DISTINCT FROM to_jsonb(counted) -> key
              AND NOT (key IN ('escalation_yield', 'accuracy') AND EXISTS (
                  SELECT FROM document d
                  LEFT JOIN document s ON s.run_id = d.of_run_id AND s.document_no = d.of_document_no
                  WHERE d.run_id = summed.run_id AND (d.state = 'result' AND d.answer IS NULL
                                                      OR d.state = 'reused' AND s.answer IS NULL)
                  UNION ALL
                  SELECT FROM answer a WHERE a.run_id = summed.run_id AND a.content = '' AND a.answer IS NULL))
            """,
            """
            SELECT format('lane %s: counted %s; its rows say %s', lane_id, counted, found)
            FROM (
                SELECT l.lane_id,
                       ROW(l.attempts, l.escalated, l.cost, l.bounds, l.hit, l.miss, l.output)::text AS counted,
                       ROW(coalesce(s.attempts, 0), coalesce(s.escalated, 0), coalesce(s.cost, 0),
                           coalesce(s.bounds, 0), coalesce(s.hit, 0), coalesce(s.miss, 0),
                           coalesce(s.output, 0))::text AS found
                FROM lane l
                LEFT JOIN (
                    SELECT i.lane_id, count(*) AS attempts,
                           count(o.signal) FILTER (WHERE i.purpose IN ('answer', 'priming') AND i.reason IS NOT NULL)
                               AS escalated,
                           sum(o.cost) AS cost, sum(u.bound) FILTER (WHERE o.cost IS NULL) AS bounds,
                           sum(o.hit) AS hit, sum(o.miss) AS miss, sum(o.output) AS output
                    FROM attempt_intent i
                    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
                    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
                    WHERE i.run_id = :run_id AND (o.signal IS NOT NULL OR u.bound IS NOT NULL)
                    GROUP BY i.lane_id
                ) s USING (lane_id)
                WHERE l.run_id = :run_id
            ) c WHERE counted IS DISTINCT FROM found
            """,
            """
            SELECT format('lane: the run''s lanes counted %s documents; the rows say %s', counted, found)
            FROM (SELECT ROW(coalesce(sum(done), 0), coalesce(sum(results), 0), coalesce(sum(dead_letters), 0),
                             coalesce(sum(reused), 0),
                             coalesce(sum(held), 0))::text AS counted
                  FROM lane WHERE run_id = :run_id) l,
                 (SELECT ROW(count(*), count(*) FILTER (WHERE state = 'result'),
                             count(*) FILTER (WHERE state = 'dead_letter'),
                             count(*) FILTER (WHERE state = 'reused'),
                             (SELECT count(*) FROM held WHERE run_id = :run_id))::text AS found
                  FROM document WHERE run_id = :run_id) d
            WHERE counted <> found
            """,
        ),
    ),
    "G9": Claim(
        "what was granted is what closed grants used plus what open ones hold, never above the cap, and no attempt "
        "cost more than was reserved for it",
        "SELECT count(*) FROM budget_grant WHERE run_id = :run_id",
        (
            """
            SELECT format('budget %s: granted is %s, its grants say %s', b.budget_id, b.granted, g.held)
            FROM run r JOIN budget b USING (budget_id)
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(coalesce(c.used, g.amount)), 0) AS held
                FROM budget_grant g
                LEFT JOIN LATERAL (SELECT used FROM grant_close x WHERE x.grant_id = g.grant_id
                                   ORDER BY close_no DESC LIMIT 1) c ON true
                WHERE g.budget_id = b.budget_id
            ) g
            WHERE r.run_id = :run_id AND b.granted <> g.held
            """,
            """
            SELECT format('budget %s: granted is %s, above the cap of %s', b.budget_id, b.granted, c.most)
            FROM run r JOIN budget b USING (budget_id)
            CROSS JOIN LATERAL (SELECT max((detail ->> 'cap')::numeric) AS most
                                FROM run_event e JOIN run x USING (run_id)
                                WHERE x.budget_id = b.budget_id AND e.kind IN ('opened', 'cap_changed')) c
            WHERE r.run_id = :run_id AND b.granted > coalesce(c.most, 0)
            """,
            """
            SELECT format('budget %s: the cap is %s, the events of its runs say %s', b.budget_id, b.cap, c.cap)
            FROM run r JOIN budget b USING (budget_id)
            LEFT JOIN LATERAL (SELECT (detail ->> 'cap')::numeric AS cap FROM run_event e JOIN run x USING (run_id)
                               WHERE x.budget_id = b.budget_id AND e.kind IN ('opened', 'cap_changed')
                               ORDER BY event_id DESC LIMIT 1) c ON true
            WHERE r.run_id = :run_id AND b.cap IS DISTINCT FROM c.cap
            """,
            """
            SELECT format('budget_grant %s: %s', grant_id, CASE
                       WHEN spent > amount THEN format('its attempts take %s of %s', spent, amount)
                       WHEN used IS NULL THEN 'is open although its lane or run has ended'
                       ELSE format('closed by %s, its attempts say %s', used, spent) END)
            FROM (
                SELECT g.grant_id, g.amount, c.used, l.ended_at IS NOT NULL OR :is_done AS is_over,
                       coalesce(s.spent, 0) AS spent
                FROM budget_grant g
                JOIN lane l USING (lane_id)
                LEFT JOIN LATERAL (SELECT used FROM grant_close x WHERE x.grant_id = g.grant_id
                                   ORDER BY close_no DESC LIMIT 1) c ON true
                LEFT JOIN (
                    SELECT i.grant_id, sum(coalesce(o.cost, u.bound, i.reserved)) AS spent
                    FROM attempt_intent i
                    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
                    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
                    WHERE i.run_id = :run_id GROUP BY i.grant_id
                ) s USING (grant_id)
                WHERE g.run_id = :run_id
            ) g
            WHERE spent > amount OR (is_over AND used IS DISTINCT FROM spent) OR used < spent
            """,
            """
            SELECT format('attempt_outcome %s.%s.%s: cost %s, and %s was reserved', o.run_id, o.document_no,
                          o.attempt_no, o.cost, i.reserved)
            FROM attempt_outcome o JOIN attempt_intent i USING (run_id, document_no, attempt_no)
            WHERE o.run_id = :run_id AND o.cost > i.reserved
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: reserved from grant %s, which is not its lane''s', i.run_id,
                          i.document_no, i.attempt_no, i.grant_id)
            FROM attempt_intent i LEFT JOIN budget_grant g USING (grant_id)
            WHERE i.run_id = :run_id AND (g.run_id, g.lane_id) IS DISTINCT FROM (i.run_id, i.lane_id)
            """,
            """
            SELECT format('budget_grant %s: from budget %s, and its run draws on %s', g.grant_id, g.budget_id,
                          r.budget_id)
            FROM budget_grant g JOIN run r USING (run_id)
            WHERE g.run_id = :run_id AND g.budget_id <> r.budget_id
            """,
        ),
    ),
    "G10": Claim(
        "each lease of a shard had one lane of this run, and nothing was intended outside of a lease",
        "SELECT count(*) FROM (SELECT DISTINCT shard_no, epoch FROM attempt_intent WHERE run_id = :run_id) e",
        (
            """
            SELECT format('shard %s.%s: lanes %s intended under one epoch, %s', run_id, shard_no,
                          string_agg(DISTINCT lane_id::text, ', '), epoch)
            FROM attempt_intent WHERE run_id = :run_id
            GROUP BY run_id, shard_no, epoch HAVING count(DISTINCT lane_id) > 1
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: under epoch %s of shard %s, after epoch %s was at work', run_id,
                          document_no, attempt_no, epoch, shard_no, newest)
            FROM (SELECT *, max(epoch) OVER (PARTITION BY shard_no ORDER BY intended_at
                                             ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS newest,
                         max(epoch) OVER (PARTITION BY shard_no ORDER BY age(xmin) DESC) AS newest_by_number
                  FROM attempt_intent WHERE run_id = :run_id) i
            WHERE epoch < newest AND epoch < newest_by_number
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: lane %s is not of this run', i.run_id, i.document_no,
                          i.attempt_no, i.lane_id)
            FROM attempt_intent i LEFT JOIN lane l USING (lane_id)
            WHERE i.run_id = :run_id AND l.run_id IS DISTINCT FROM i.run_id
            """,
            """
            SELECT format('attempt_intent %s.%s.%s: epoch %s of shard %s, which is at %s', i.run_id, i.document_no,
                          i.attempt_no, i.epoch, i.shard_no, s.lease_epoch)
            FROM attempt_intent i LEFT JOIN shard s USING (run_id, shard_no)
            WHERE i.run_id = :run_id AND (s.lease_epoch IS NULL OR i.epoch > s.lease_epoch OR i.epoch < 1
                OR i.document_no NOT BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1)
            """,
        ),
    ),
}
