"""The rights in a ledger as sentences: alone responsible for reading them from the catalog and from the declaration.

Two readings that must be equal. `found` asks Postgres's catalog, not the migrations, and says everything that could
let somebody do something: owners, grants to each role and to PUBLIC, default privileges, memberships, attributes,
triggers, policies, rules and how functions run. `declared` reads migrations/permissions.toml.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg

DECLARATION = Path(__file__).parents[2] / "migrations" / "permissions.toml"
ROLES = ["farthing_owner", "farthing_lane", "farthing_auditor", "farthing_bookkeeper", "farthing_retention"]
KINDS = ("schema", "table", "sequence", "view", "function")
#: Keys of a declared object that are no roles.
_TRIGGERS = {"refuses": "refuse_change", "purges": "refuse_all_but_purge"}
_RIGHT = re.compile(r"(?P<right>[A-Z]+)(?: \((?P<columns>[a-z_, ]+)\))?")

_OBJECTS = """
    SELECT format('%s %s: belongs to %s', kind, name, owner::regrole) FROM objects
    UNION ALL
    SELECT format('%s %s: %s may %s%s', kind, name, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                  privilege_type, CASE WHEN is_grantable THEN ' and grant it' ELSE '' END)
    FROM objects, aclexplode(coalesce(acl, acldefault(acl_kind, owner))) WHERE grantee <> owner
    UNION ALL
    SELECT format('table %s: %s may %s (%s)%s', c.relname, CASE grantee WHEN 0 THEN 'PUBLIC'
                  ELSE grantee::regrole::text END, privilege_type, attname,
                  CASE WHEN is_grantable THEN ' and grant it' ELSE '' END)
    FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid, aclexplode(attacl)
    WHERE c.relnamespace = 'farthing'::regnamespace AND NOT attisdropped
"""
#: Everything a query can name: relations that are no index, functions, types of their own, and the schema.
_ALL_OBJECTS = """
    WITH objects (kind, name, owner, acl, acl_kind) AS (
        SELECT CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'table' WHEN 'v' THEN 'view' WHEN 'S' THEN 'sequence'
                            ELSE 'relation of kind ' || relkind::text END,
               relname::text, relowner, relacl, (CASE relkind WHEN 'S' THEN 's' ELSE 'r' END)::"char"
        FROM pg_class WHERE relnamespace = 'farthing'::regnamespace AND relkind NOT IN ('i', 'I', 't')
        UNION ALL
        SELECT 'function', format('%s(%s)', proname, pg_get_function_identity_arguments(oid)), proowner, proacl, 'f'
        FROM pg_proc WHERE pronamespace = 'farthing'::regnamespace
        UNION ALL
        SELECT 'type', typname, typowner, typacl, 'T' FROM pg_type t
        WHERE typnamespace = 'farthing'::regnamespace AND typelem = 0
          AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind <> 'c')
        UNION ALL
        SELECT 'schema', nspname, nspowner, nspacl, 'n' FROM pg_namespace WHERE nspname = 'farthing'
    )
"""
_TRIGGER_FACTS = """
    SELECT format('table %s: %s %s by %s, %s%s', c.relname, event, CASE WHEN tgtype & 2 > 0 THEN 'is checked before'
                  ELSE 'is followed' END, proname, CASE WHEN tgtype & 1 > 0 THEN 'each row' ELSE 'each statement' END,
                  CASE WHEN tgenabled = 'O' AND tgqual IS NULL AND tgattr = '' THEN '' ELSE ', not always' END)
    FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid JOIN pg_proc p ON p.oid = tgfoid
    CROSS JOIN (VALUES (4, 'INSERT'), (8, 'DELETE'), (16, 'UPDATE'), (32, 'TRUNCATE')) AS events (bit, event)
    WHERE c.relnamespace = 'farthing'::regnamespace AND NOT tgisinternal AND tgtype & bit > 0
"""
#: A foreign key that somebody disabled, rows that somebody hides or lets through, statements that become others.
_STRANGE = """
    SELECT format('table %s: %s is disabled', tgrelid::regclass, tgname) FROM pg_trigger
    WHERE tgisinternal AND tgenabled <> 'O'
    UNION ALL
    SELECT format('table %s: has row security', relname) FROM pg_class
    WHERE relnamespace = 'farthing'::regnamespace AND (relrowsecurity OR relforcerowsecurity)
    UNION ALL
    SELECT format('table %s: has the rule %s', ev_class::regclass, rulename) FROM pg_rewrite
    WHERE rulename <> '_RETURN' AND ev_class::regclass::text LIKE 'farthing.%'
    UNION ALL
    SELECT format('event trigger %s', evtname) FROM pg_event_trigger
"""
_FUNCTION_FACTS = """
    SELECT format('function %s(%s): runs as its %s, with %s', proname, pg_get_function_identity_arguments(oid),
                  CASE WHEN prosecdef THEN 'owner' ELSE 'caller' END,
                  coalesce(array_to_string(proconfig, '; '), 'the search_path of its caller'))
    FROM pg_proc WHERE pronamespace = 'farthing'::regnamespace
    UNION ALL
    SELECT format('view %s: %s', relname, array_to_string(reloptions, '; ')) FROM pg_class
    WHERE relnamespace = 'farthing'::regnamespace AND relkind = 'v' AND reloptions IS NOT NULL
"""
_ROLE_FACTS = """
    WITH ours AS (SELECT oid FROM pg_roles WHERE rolname LIKE 'farthing\\_%'),
    of_schema (class, oid) AS (
        SELECT 'pg_class'::regclass, oid FROM pg_class
        WHERE relnamespace = 'farthing'::regnamespace OR relnamespace::regnamespace::text ~ '^pg_(toast_)?temp_'
        UNION ALL
        SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace = 'farthing'::regnamespace
        UNION ALL
        SELECT 'pg_namespace'::regclass, 'farthing'::regnamespace
    )
    SELECT format('role %s%s', rolname, CASE WHEN attributes = '' THEN '' ELSE ': ' || attributes END) FROM (
        SELECT rolname, concat_ws(', ',
            CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
            CASE WHEN rolcreatedb THEN 'CREATEDB' END, CASE WHEN rolcanlogin THEN 'LOGIN' END,
            CASE WHEN rolreplication THEN 'REPLICATION' END, CASE WHEN rolbypassrls THEN 'BYPASSRLS' END,
            CASE WHEN rolconfig IS NOT NULL THEN array_to_string(rolconfig, ' ') END) AS attributes
        FROM pg_roles WHERE rolname LIKE 'farthing\\_%'
    ) r
    UNION ALL
    SELECT format('role %s: is a member of %s', member::regrole, roleid::regrole) FROM pg_auth_members
    WHERE member IN (TABLE ours)
    UNION ALL
    SELECT format('default privileges of %s on %s in %s: %s', defaclrole::regrole, defaclobjtype,
                  coalesce(nullif(defaclnamespace, 0)::regnamespace::text, 'every schema'), item)
    FROM pg_default_acl, unnest(defaclacl) item
    UNION ALL
    SELECT format('role %s: has a right on or owns something in %s, outside of the schema', refobjid::regrole,
                  classid::regclass)
    FROM pg_shdepend
    WHERE refclassid = 'pg_authid'::regclass AND refobjid IN (TABLE ours) AND deptype IN ('a', 'o', 'i')
      AND dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
      AND (classid, objid) NOT IN (TABLE of_schema)
"""


def found(connection: psycopg.Connection) -> set[str]:
    """What the catalog of this database says."""
    queries = (_ALL_OBJECTS + _OBJECTS, _TRIGGER_FACTS, _STRANGE, _FUNCTION_FACTS, _ROLE_FACTS)
    with connection.transaction():
        connection.execute("SET LOCAL search_path TO pg_catalog")
        return {said for query in queries for (said,) in connection.execute(query).fetchall()}


def declared() -> set[str]:
    """What migrations/permissions.toml says."""
    page = tomllib.loads(DECLARATION.read_text())
    return {
        *(f"role {name}{': ' if rights else ''}{', '.join(rights)}" for name, rights in page["roles"].items()),
        *(said for kind in KINDS for said in _objects(kind, page[f"{kind}s"])),
    }


def _objects(kind: str, objects: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, says in objects.items():
        yield f"{kind} {name}: belongs to farthing_owner"
        for role in says.keys() & set(ROLES):
            yield from (f"{kind} {name}: {role} may {right}" for right in _spell(says[role]))
        for key in says.keys() & _TRIGGERS.keys():
            yield from (f"table {name}: {_spell_check(event, _TRIGGERS[key])}" for event in says[key])
        if kind == "function":
            whose = "owner" if says.get("is_owners") else "caller"
            settings = "; ".join([f"search_path={says['search_path']}", *filter(None, [says.get("also")])])
            yield f"function {name}: runs as its {whose}, with {settings}"
        if says.get("is_barrier"):
            yield f"view {name}: security_barrier=true"


def _spell(rights: list[str]) -> Iterator[str]:
    """`UPDATE (a, b)` as the catalog has it: a right on each column."""
    for right in rights:
        read = _RIGHT.fullmatch(right)
        assert read is not None, f"{DECLARATION.name}: {right!r} is no right"
        columns = read["columns"].split(", ") if read["columns"] else []
        yield from (f"{read['right']} ({column})" for column in columns) if columns else (right,)


def _spell_check(event: str, function: str) -> str:
    return f"{event} is checked before by {function}, each {'statement' if event == 'TRUNCATE' else 'row'}"
