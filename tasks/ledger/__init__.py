"""The one door to Postgres: runs, leases, attempts, budgets, spend and proof, one module each.

Everything here is durable when it returns. Nothing outside this package speaks SQL.
"""
