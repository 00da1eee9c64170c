"""The five roles of the ledger, and who may do what (G16).

`farthing_owner` owns tables and views and runs migrations. `farthing_lane` appends to the ledger and updates
only the columns that are state. `farthing_auditor` reads the views and nothing else. `farthing_bookkeeper` books what
the provider's export says of unknown attempts, and closes months. `farthing_retention` may blank answers, never
costs. None can log in: grant them to your own logins.
"""

from __future__ import annotations

OWNER, LANE, AUDITOR, BOOKKEEPER, RETENTION = ROLES = (
    "farthing_owner",
    "farthing_lane",
    "farthing_auditor",
    "farthing_bookkeeper",
    "farthing_retention",
)

#: Idempotent; run by the login that migrates. Its session keeps the lock, for two upgrades of one ledger would meet
#: between two migrations. It needs CREATEROLE only where the roles do not exist yet.
CREATE = f"""
SELECT pg_advisory_lock(hashtext('farthing'));
DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['{OWNER}', '{LANE}', '{AUDITOR}', '{BOOKKEEPER}', '{RETENTION}'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', name);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL;  -- another database of this cluster was migrated at the same moment
            END;
        END IF;
        -- before Postgres 16 a member may always SET ROLE
        IF NOT pg_has_role(current_user, name, CASE WHEN current_setting('server_version_num')::int < 160000
                                                    THEN 'MEMBER' ELSE 'SET' END) THEN
            EXECUTE format('GRANT %I TO CURRENT_USER', name);
        END IF;
    END LOOP;
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'farthing') THEN
        EXECUTE 'CREATE SCHEMA farthing AUTHORIZATION {OWNER}';
    END IF;
END $$;
"""
