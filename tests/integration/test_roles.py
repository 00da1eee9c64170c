"""What each role may not do, tried: real logins of one role each attack the ledger (G16).

What they may do is in migrations/permissions.toml, which test_rights.py holds against the catalog.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psycopg
import pytest
from psycopg import errors, sql

from schemas.tables import metadata
from tasks.ledger.connection import Ledger
from tests.integration.rights import declared, found
from tests.ledgers import BACKFILL, MONTH_CLOSE, run_everything

#: Roles are the whole server's, and so are the locks on them: one worker at a time.
pytestmark = pytest.mark.xdist_group("rights")

LANE, AUDITOR, RETENTION, NOBODY = "farthing_lane", "farthing_auditor", "farthing_retention", ""
TABLES = sorted(table.name for table in metadata.tables.values())


@dataclass(frozen=True)
class Ground:
    """A ledger in which everything happened, as its superuser sees it."""

    url: str
    root: psycopg.Connection

    @contextmanager
    def login(self, role: str) -> Iterator[psycopg.Connection]:
        """A connection of a login that is a member of `role` and of nothing else."""
        name, password = f"attacker_{secrets.token_hex(6)}", secrets.token_hex(12)
        who = sql.Identifier(name)
        self.root.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(who, password))
        if role:
            self.root.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), who))
        try:
            with psycopg.connect(self.url, user=name, password=password, autocommit=True) as connection:
                connection.execute("SET search_path TO farthing")
                yield connection
        finally:
            self.root.execute(sql.SQL("DROP OWNED BY {}").format(who))
            self.root.execute(sql.SQL("DROP ROLE {}").format(who))

    def rows(self) -> dict[str, list[tuple[object, ...]]]:
        """Everything that is in the ledger."""
        return {
            table: self.root.execute(
                sql.SQL("SELECT * FROM {} ORDER BY 1, 2").format(sql.Identifier(table))
            ).fetchall()
            for table in TABLES
        }


@pytest.fixture
async def ground(ledger: Ledger, ledger_url: str) -> AsyncIterator[Ground]:
    await run_everything(ledger)
    with psycopg.connect(ledger_url, autocommit=True, options="-c search_path=farthing") as root:
        root.execute("INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, 5, 'an export')")
        root.execute(BACKFILL)
        root.execute(MONTH_CLOSE)
        yield Ground(ledger_url, root)


@pytest.fixture(autouse=True)
def _left(ground: Ground) -> Iterator[None]:
    """Whatever is tried, no row and no right may be another afterwards."""
    before = ground.rows()
    yield
    assert ground.rows() == before
    assert found(ground.root) == declared()


def get_through(connection: psycopg.Connection, *attacks: str) -> list[str]:
    """The attacks that were not refused; their effects are undone."""
    through = []
    for attack in attacks:
        try:
            if attack.startswith("ALTER SYSTEM"):  # not inside a transaction
                connection.execute(attack)
            else:
                with connection.transaction(force_rollback=True):
                    connection.execute(attack)
        except errors.InsufficientPrivilege:
            continue
        except psycopg.Error as error:
            through.append(f"{attack}: {type(error).__name__} {error}")
        else:
            through.append(attack)
    return through


#: Beyond the ledger: other roles, the server's files and programs, other schemas, the server's settings.
BEYOND = (
    "SET ROLE farthing_owner",
    "SET SESSION AUTHORIZATION farthing_owner",
    "SET session_replication_role = replica",
    "GRANT farthing_owner TO CURRENT_USER",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "ALTER ROLE farthing_owner LOGIN",
    "CREATE ROLE accomplice",
    "ALTER SYSTEM SET fsync = off",
    "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET fsync = off', current_database()); END $$",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO '/dev/null'",
    "CREATE TEMP TABLE got (line text); COPY got FROM PROGRAM 'id'",
    "CREATE TEMP TABLE got (line text); COPY got FROM '/etc/passwd'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_ls_dir('.')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT rolpassword FROM pg_authid",
    "SELECT pg_reload_conf()",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'farthing' AND pid <> pg_backend_pid()",
    "UPDATE pg_class SET relacl = NULL",
    "CREATE SCHEMA mine",
    "CREATE TABLE public.mine (number integer)",
    "CREATE TABLE farthing.mine (number integer)",
    "CREATE FUNCTION farthing.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION public.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "DROP EXTENSION plpgsql CASCADE",
    "CREATE FUNCTION pg_temp.mine() RETURNS integer LANGUAGE c AS '/lib/x86_64-linux-gnu/libc.so.6', 'abort'",
    "CREATE EVENT TRIGGER mine ON ddl_command_start EXECUTE FUNCTION refuse_change()",
    "CREATE PUBLICATION mine FOR ALL TABLES",
    "CREATE SUBSCRIPTION mine CONNECTION 'host=127.0.0.1' PUBLICATION p WITH (connect = false)",
    "ALTER DEFAULT PRIVILEGES FOR ROLE farthing_owner GRANT ALL ON TABLES TO PUBLIC",
)
#: What only the owner of a table may do to it, and what nobody may; {} is the table.
ON_A_TABLE = (
    "DELETE FROM {}",
    "TRUNCATE {} CASCADE",
    "MERGE INTO {} USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM {} RETURNING 1) SELECT count(*) FROM gone",
    "ALTER TABLE {} DISABLE TRIGGER USER",
    "ALTER TABLE {} ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE {} OWNER TO CURRENT_USER",
    "ALTER TABLE {} ADD COLUMN mine integer",
    "CREATE TRIGGER mine BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE RULE mine AS ON INSERT TO {} DO INSTEAD NOTHING",
    "CREATE INDEX ON {} ((1))",
    "COMMENT ON TABLE {} IS 'mine'",
    "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE",
    "DROP TABLE {} CASCADE",
)
ON_THE_CODE = (
    "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    "DROP FUNCTION refuse_change() CASCADE",
    "ALTER FUNCTION refuse_all_but_purge() SET search_path TO public",
    "CREATE OR REPLACE VIEW unpriced AS SELECT 1",
    "SELECT nextval('budget_grant_grant_id_seq')",
    "SELECT setval('run_run_id_seq', 1)",
    "DROP SCHEMA farthing CASCADE",
    "ALTER SCHEMA farthing RENAME TO mine",
)


@pytest.mark.parametrize("role", [LANE, AUDITOR, RETENTION, NOBODY])
def test_nobody_gets_beyond_the_ledger(role: str, ground: Ground) -> None:
    # whoever has no USAGE on the schema is told that its triggers' function does not exist
    attacks = [attack for attack in BEYOND if role or "refuse_change" not in attack]
    with ground.login(role) as connection:
        assert get_through(connection, *attacks) == []


@pytest.mark.parametrize("role", [LANE, AUDITOR, RETENTION])
def test_nobody_deletes_truncates_or_changes_how_a_table_works(role: str, ground: Ground) -> None:
    with ground.login(role) as connection:
        for table in TABLES:
            assert get_through(connection, *(attack.format(table) for attack in ON_A_TABLE)) == []
            with suppress(errors.InsufficientPrivilege):  # of one with some rights it makes a warning
                connection.execute(f"GRANT ALL ON {table} TO PUBLIC")
        assert get_through(connection, *ON_THE_CODE) == []


def test_a_lane_cannot_become_another_role(ground: Ground) -> None:
    with ground.login(LANE) as connection:
        roles = (AUDITOR, RETENTION, "pg_read_all_data", "pg_write_server_files", "farthing")
        assert get_through(connection, *(f"SET ROLE {role}" for role in roles)) == []


def test_a_lane_appends_and_rewrites_nothing(ground: Ground) -> None:
    key = "run_id, document_no, attempt_no"
    with ground.login(LANE) as connection:
        attacks = (
            "UPDATE attempt_outcome SET cost = 0",
            "UPDATE attempt_unknown SET bound = 0",
            "UPDATE document SET answer = NULL",
            "UPDATE budget_grant SET amount = 1",
            "UPDATE run SET budget_id = 2",
            "UPDATE run SET is_simulated = true",
            "UPDATE run SET reuses = NULL",
            "UPDATE backfill SET cap = cap * 2",
            "UPDATE shard SET document_count = 1",
            "UPDATE lane SET run_id = 2",
            "SELECT FROM attempt_outcome FOR UPDATE",
            f"INSERT INTO attempt_outcome SELECT * FROM attempt_outcome ON CONFLICT ({key}) DO UPDATE SET cost = 0",
            "MERGE INTO attempt_intent USING (SELECT 1) s ON true WHEN MATCHED THEN UPDATE SET reserved = 0",
            "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, -5, '')",
            "UPDATE ledger_version SET version_num = '9999'",
        )
        assert get_through(connection, *attacks) == []


def test_an_auditor_reads_no_table_and_writes_nothing(ground: Ground) -> None:
    with ground.login(AUDITOR) as connection:
        for table in (name for name in TABLES if name != "ledger_version"):
            assert get_through(
                connection,
                f"SELECT FROM {table}",
                f"COPY {table} TO STDOUT",
                f"CREATE TEMP TABLE copied AS TABLE {table}",
                f"CREATE TEMP VIEW peek AS SELECT * FROM {table}; SELECT * FROM peek",
                f"INSERT INTO {table} DEFAULT VALUES",
            ) == []  # fmt: skip
        forgery = "INSERT INTO event (run_id, kind) VALUES (1, 'forged')"
        changes = ("DELETE FROM event", "UPDATE lane_progress SET done = 0", "UPDATE dead_letter SET reason = ''")
        assert get_through(connection, forgery, *changes) == []


def test_an_auditor_s_function_sees_no_row_that_a_view_hides(ground: Ground) -> None:
    """The planner may run a cheap function of the reader's before the view's own filter, unless it is a barrier."""
    with ground.login(AUDITOR) as connection:
        connection.execute(
            "CREATE FUNCTION pg_temp.saw(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001"
            " AS $$ BEGIN RAISE NOTICE '%', coalesce($1, ''); RETURN true; END $$"
        )
        overheard: set[str] = set()
        connection.add_notice_handler(lambda notice: overheard.add(notice.message_primary or ""))
        told: set[str] = set()
        views = connection.execute(
            "SELECT c.relname, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
            " WHERE relnamespace = 'farthing'::regnamespace AND relkind = 'v' AND attnum > 0"
        ).fetchall()
        for view, column in views:
            told.update(text for (text,) in connection.execute(f"SELECT {column}::text FROM {view}") if text)
            connection.execute(f"SELECT FROM {view} WHERE pg_temp.saw({column}::text)")
    assert len(views) > 150
    assert overheard & told
    assert sorted(overheard - told - {""}) == []


def test_even_the_owner_is_stopped_by_triggers(ground: Ground) -> None:
    state = {"run", "backfill", "shard", "lane", "budget"}
    with ground.root.transaction(force_rollback=True):
        ground.root.execute("SET LOCAL ROLE farthing_owner")
        for table in TABLES:
            assert ground.root.execute(f"SELECT FROM {table} LIMIT 1").fetchall() != [], f"{table}: nothing to try on"
            column = list(metadata.tables[f"farthing.{table}"].columns)[-1].name
            attacks = [f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE", f"UPDATE {table} SET {column} = {column}"]
            assert get_through(ground.root, *attacks[: 2 if table in state else 3]) == []


def test_retention_blanks_answers_and_nothing_else(ground: Ground) -> None:
    with ground.login(RETENTION) as connection:
        allowed = ("UPDATE document SET answer = NULL", "UPDATE answer SET answer = NULL, content = ''")
        assert get_through(connection, *allowed) == list(allowed)
        assert get_through(
            connection,
            """UPDATE document SET answer = '{"colour": "forged"}'""",
            "UPDATE answer SET answer = NULL, content = 'forged'",
            "UPDATE document SET state = 'dead_letter'",
            "SELECT document_id FROM document",
            "SELECT content FROM answer",
            "SELECT FROM run_cost",
            "INSERT INTO answer (run_id, document_no, attempt_no, content) VALUES (1, 1, 9, '')",
            "LOCK TABLE document IN ACCESS EXCLUSIVE MODE",
        ) == []  # fmt: skip


def test_retention_cannot_put_a_function_of_its_own_in_the_way_of_the_purge_trigger(ground: Ground) -> None:
    """A login may own a schema of its own; the trigger must not look there for what it calls."""
    with ground.login(RETENTION) as connection:
        who = sql.Identifier(connection.info.user)
        ground.root.execute(sql.SQL("CREATE SCHEMA mine AUTHORIZATION {}").format(who))
        connection.execute(
            "CREATE FUNCTION mine.to_jsonb(farthing.answer) RETURNS jsonb LANGUAGE sql AS $$ SELECT '{}'::jsonb $$;"
            "SET search_path TO mine, pg_catalog, farthing"
        )
        assert get_through(connection, "UPDATE answer SET answer = NULL, content = 'forged'") == []
