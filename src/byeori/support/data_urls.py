"""Addresses of rows that are neither files nor datasets of the Hub: `s3://bucket/a.jsonl`, `postgresql://host/db`."""

from __future__ import annotations

import re

_URL = re.compile(r"([A-Za-z][\w.+-]*)://")
_DATABASES = {"sqlite", "postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "duckdb", "snowflake"}


def is_url(path: str) -> bool:
    """Return whether a path is an address: of files, or of a database."""
    return _URL.match(path) is not None


def is_database(path: str) -> bool:
    """Return whether a path is the address of a database, as SQLAlchemy writes it (`postgresql+psycopg://...`)."""
    match = _URL.match(path)
    return match is not None and match[1].lower().partition("+")[0] in _DATABASES
