"""The catalog explains itself: no table, view, column or function of the ledger is without a comment."""

from __future__ import annotations

from tests.ledgers import sql

_UNEXPLAINED = """
    SELECT relname::text FROM pg_class
    WHERE relnamespace = 'farthing'::regnamespace AND relkind NOT IN ('i', 'S', 't')
      AND coalesce(obj_description(oid, 'pg_class'), '') = ''
    UNION ALL
    SELECT c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE c.relnamespace = 'farthing'::regnamespace AND c.relkind NOT IN ('i', 'S', 't') AND a.attnum > 0
      AND NOT a.attisdropped AND coalesce(col_description(c.oid, a.attnum), '') = ''
    UNION ALL
    SELECT proname || '()' FROM pg_proc
    WHERE pronamespace = 'farthing'::regnamespace AND coalesce(obj_description(oid, 'pg_proc'), '') = ''
    ORDER BY 1
"""


def test_nothing_is_without_a_comment(ledger_url: str) -> None:
    assert sql(ledger_url, _UNEXPLAINED) == []
    sql(ledger_url, "COMMENT ON COLUMN spend.hit_pico IS NULL; COMMENT ON FUNCTION sum_up(bigint) IS NULL")
    assert sql(ledger_url, _UNEXPLAINED) == [("spend.hit_pico",), ("sum_up()",)]
