"""The declared matrix of rights is what Postgres's catalog says, in both directions; and each check of it bites."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest

from sandbox.postgres import Server, create_database, drop_database
from tests.integration.rights import ROLES, declared, found

#: Roles are the whole server's, and so are the locks on them: one worker at a time.
pytestmark = pytest.mark.xdist_group("rights")
LANE, AUDITOR, RETENTION = "farthing_lane", "farthing_auditor", "farthing_retention"
BOOKKEEPER = "farthing_bookkeeper"


@pytest.fixture(scope="module")
def owner(postgres: Server, template: str) -> Iterator[psycopg.Connection]:
    """The superuser in a migrated ledger, in which no test leaves anything."""
    name = f"rights_{uuid.uuid4().hex}"
    url = create_database(postgres, name, template=template)
    with psycopg.connect(url, autocommit=True, options="-c search_path=farthing") as connection:
        yield connection
    drop_database(postgres, name)


def test_the_catalog_says_what_is_declared_and_nothing_else(owner: psycopg.Connection) -> None:
    in_catalog, on_page = found(owner), declared()
    assert sorted(in_catalog - on_page) == [], (
        "Postgres allows or does this, and migrations/permissions.toml is silent"
    )
    assert sorted(on_page - in_catalog) == [], "migrations/permissions.toml says this, and Postgres does not"
    assert len(on_page) > 200


#: A migration's slip, and what the catalog then says that the page does not, or (-) the other way round.
SLIPS = {
    "a table for the auditor": (
        "GRANT SELECT ON answer TO farthing_auditor",
        "table answer: farthing_auditor may SELECT",
    ),
    "a column for the lane": (
        "GRANT UPDATE (cost) ON attempt_outcome TO farthing_lane",
        "table attempt_outcome: farthing_lane may UPDATE (cost)",
    ),
    "a view for everybody": ("GRANT SELECT ON run_cost TO PUBLIC", "view run_cost: PUBLIC may SELECT"),
    "a right to hand on": (
        "GRANT SELECT ON result TO farthing_auditor WITH GRANT OPTION",
        "view result: farthing_auditor may SELECT and grant it",
    ),
    "a right for somebody unknown": ("GRANT INSERT ON price TO pg_monitor", "table price: pg_monitor may INSERT"),
    "maintenance": ("GRANT MAINTAIN ON run TO farthing_lane", "table run: farthing_lane may MAINTAIN"),
    "a sequence": (
        "GRANT UPDATE ON budget_grant_grant_id_seq TO farthing_lane",
        "sequence budget_grant_grant_id_seq: farthing_lane may UPDATE",
    ),
    "the schema": ("GRANT CREATE ON SCHEMA farthing TO farthing_lane", "schema farthing: farthing_lane may CREATE"),
    "a function for everybody": (
        "GRANT EXECUTE ON FUNCTION refuse_change() TO PUBLIC",
        "function refuse_change(): PUBLIC may EXECUTE",
    ),
    "a right taken away": (
        "REVOKE INSERT ON attempt_intent FROM farthing_lane",
        "- table attempt_intent: farthing_lane may INSERT",
    ),
    "a trigger gone": (
        "DROP TRIGGER append_only ON attempt_outcome",
        "- table attempt_outcome: UPDATE is checked before by refuse_change, each row",
    ),
    "a trigger disabled": (
        "ALTER TABLE attempt_intent DISABLE TRIGGER append_only",
        "table attempt_intent: DELETE is checked before by refuse_change, each row, not always",
    ),
    "a trigger for some columns": (
        "DROP TRIGGER append_only ON price;"
        "CREATE TRIGGER append_only BEFORE UPDATE OF model OR DELETE ON price"
        " FOR EACH ROW EXECUTE FUNCTION refuse_change()",
        "table price: UPDATE is checked before by refuse_change, each row, not always",
    ),
    "a foreign key disabled": (
        "ALTER TABLE run_event DISABLE TRIGGER ALL",
        "table run_event: DELETE is checked before by refuse_change, each row, not always",
    ),
    "a new table": ("CREATE TABLE secret (number integer)", "table secret: belongs to farthing"),
    "a new table of the owner's": (
        "SET LOCAL ROLE farthing_owner; CREATE TABLE secret (number integer)",
        "table secret: belongs to farthing_owner",
    ),
    "a function with its owner's rights": (
        "ALTER FUNCTION refuse_change() SECURITY DEFINER",
        "function refuse_change(): runs as its owner, with search_path=pg_catalog, pg_temp",
    ),
    "a function with its caller's search_path": (
        "ALTER FUNCTION refuse_change() RESET ALL",
        "function refuse_change(): runs as its caller, with the search_path of its caller",
    ),
    "a barrier gone": ("ALTER VIEW unpriced RESET (security_barrier)", "- view unpriced: security_barrier=true"),
    "rights of what is to come": (
        "ALTER DEFAULT PRIVILEGES FOR ROLE farthing_owner GRANT SELECT ON TABLES TO farthing_auditor",
        "default privileges of farthing_owner on r in every schema: farthing_auditor=r/farthing_owner",
    ),
    "an attribute": ("ALTER ROLE farthing_lane CREATEDB", "role farthing_lane: CREATEDB"),
    "a role that can log in": ("ALTER ROLE farthing_auditor LOGIN", "role farthing_auditor: LOGIN"),
    "a role with a setting": (
        "ALTER ROLE farthing_lane SET work_mem = '1GB'",
        "role farthing_lane: work_mem=1GB",
    ),
    "a membership": (
        "GRANT farthing_owner TO farthing_lane",
        "role farthing_lane: is a member of farthing_owner",
    ),
    "a membership of a predefined role": (
        "GRANT pg_read_all_data TO farthing_auditor",
        "role farthing_auditor: is a member of pg_read_all_data",
    ),
    "a right outside of the schema": (
        "GRANT CREATE ON SCHEMA public TO farthing_lane",
        "role farthing_lane: has a right on or owns something in pg_namespace, outside of the schema",
    ),
    "a right on the database": (
        "DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO farthing_lane', current_database()); END $$",
        "role farthing_lane: has a right on or owns something in pg_database, outside of the schema",
    ),
    "a setting that stops triggers": (
        "GRANT SET ON PARAMETER session_replication_role TO farthing_lane",
        "role farthing_lane: has a right on or owns something in pg_parameter_acl, outside of the schema",
    ),
    "a rule": (
        "CREATE RULE nothing AS ON INSERT TO run_event DO INSTEAD NOTHING",
        "table farthing.run_event: has the rule nothing",
    ),
    "row security": ("ALTER TABLE run ENABLE ROW LEVEL SECURITY", "table run: has row security"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_a_migration_is_seen(slip: str, owner: psycopg.Connection) -> None:
    statement, seen = SLIPS[slip]
    with owner.transaction(force_rollback=True):
        owner.execute(statement)
        in_catalog, on_page = found(owner), declared()
    differences = {*(in_catalog - on_page), *(f"- {said}" for said in on_page - in_catalog)}
    assert seen in differences, sorted(differences)


#: Postgres's own answer for every role × table or view × column, whatever the way a right came about.
_MAY = """
    SELECT rolname, relname, attname, privilege FROM pg_roles, pg_class c, pg_attribute a,
           unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) privilege
    WHERE rolname = ANY(%(roles)s) AND relnamespace = 'farthing'::regnamespace AND relkind IN ('r', 'v', 'p', 'm')
      AND attrelid = c.oid AND attnum > 0 AND NOT attisdropped
      AND has_column_privilege(rolname, c.oid, attnum, privilege)
    UNION ALL
    SELECT rolname, relname, '', privilege FROM pg_roles, pg_class c,
           unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER', 'MAINTAIN']) privilege
    WHERE rolname = ANY(%(roles)s) AND relnamespace = 'farthing'::regnamespace AND relkind IN ('r', 'v', 'p', 'm')
      AND has_table_privilege(rolname, c.oid, privilege)
    UNION ALL
    SELECT rolname, relname, '', privilege FROM pg_roles, pg_class c,
           unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) privilege
    WHERE rolname = ANY(%(roles)s) AND relnamespace = 'farthing'::regnamespace AND relkind = 'S'
      AND CASE WHEN relkind = 'S' THEN has_sequence_privilege(rolname, c.oid, privilege) END
    UNION ALL
    SELECT rolname, proname, '', 'EXECUTE' FROM pg_roles, pg_proc p
    WHERE rolname = ANY(%(roles)s) AND pronamespace = 'farthing'::regnamespace
      AND has_function_privilege(rolname, p.oid, 'EXECUTE')
    UNION ALL
    SELECT rolname, 'farthing', '', privilege FROM pg_roles, unnest(ARRAY['USAGE', 'CREATE']) privilege
    WHERE rolname = ANY(%(roles)s) AND has_schema_privilege(rolname, 'farthing', privilege)
"""
Right = tuple[str, str, str, str]


def may(connection: psycopg.Connection, *roles: str) -> set[Right]:
    """Role, object, column and privilege, as Postgres itself decides."""
    return set(connection.execute(_MAY, {"roles": list(roles)}).fetchall())


def said(connection: psycopg.Connection) -> set[Right]:
    """The same, derived from the page: a right on a table is one on each of its columns."""
    columns: dict[str, list[str]] = {}
    for table, column in connection.execute(
        "SELECT relname, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
        " WHERE relnamespace = 'farthing'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0"
    ):
        columns.setdefault(table, []).append(column)
    rights = [fact.partition(": ") for fact in declared() if " may " in fact]
    split = [
        (thing.split()[1].partition("(")[0], *words.replace("(", "").replace(")", "").split(" may "))
        for thing, _, words in rights
    ]
    return {
        (role, name, column, right.split()[0])
        for name, role, right in split
        for column in (right.split()[1:] or columns.get(name, [""]))
    }


def test_postgres_decides_as_declared_for_every_role_object_column_and_privilege(owner: psycopg.Connection) -> None:
    real, on_page = may(owner, LANE, AUDITOR, BOOKKEEPER, RETENTION), said(owner)
    assert sorted(real - on_page) == []
    assert sorted(on_page - real) == []


def test_a_stranger_may_do_nothing(owner: psycopg.Connection) -> None:
    with owner.transaction(force_rollback=True):
        owner.execute("CREATE ROLE farthingless LOGIN")
        assert may(owner, "farthingless", "pg_monitor") == set()


def test_no_setting_that_stops_triggers_is_anybody_s(owner: psycopg.Connection) -> None:
    for role in ROLES:
        allowed = "SELECT has_parameter_privilege(%s, 'session_replication_role', 'SET')"
        assert owner.execute(allowed, [role]).fetchone() == (False,)
