"""The rows of a query -> a file of jsonl in datasets' cache, which is read as any other.

Only the first process of a machine asks the database; the others read the rows that it got, since a second answer may
have other rows.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from byeori.data.readers.text import check_unique
from byeori.errors import DataError
from byeori.support.atomic_files import new_file
from byeori.support.text_files import one_line, redacted


def fetch(url: str, query: str | None) -> Path:
    """Return a file with the rows of a query. url: as SQLAlchemy writes it.

    Dates are text (ISO 8601), numbers of exactly so many digits (numeric) are text as the database writes them.

    Raises:
        DataError: if a package is missing, the database cannot be reached, or the query fails or returns no rows.
    """
    import datasets

    if query is None:
        raise DataError(f"{url} is a database; say with --query which rows to read, such as 'SELECT * FROM rows'.")
    if "://***@" in url:
        raise DataError(f"{url}: passwords are not saved with a run; give the whole address.")
    name = hashlib.blake2b(f"{url}\0{query}".encode(), digest_size=16).hexdigest()
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / "queries" / f"{name}.jsonl"
    if os.environ.get("LOCAL_RANK", "0") != "0" and copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        import sqlalchemy
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise DataError("rows in a database need SQLAlchemy; install it with `pip install 'byeori[sql]'`.") from None
    try:
        address = sqlalchemy.make_url(url)
        if address.drivername in ("postgres", "postgresql"):
            address = address.set(drivername="postgresql+psycopg")
        file = address.database
        if address.get_backend_name() == "sqlite" and file and not Path(file).is_file():  # it would be made
            raise DataError(f"there is no file {file}; an absolute path has four slashes: sqlite:////data/rows.db.")
        with new_file(copy) as temporary, temporary.open("w", encoding="utf-8") as out:
            _write(sqlalchemy.create_engine(address), query, out, redacted(url))
    except ImportError as error:
        raise DataError(f"{url} needs a driver ({one_line(error)}); install it with pip.") from None
    except SQLAlchemyError as error:
        reason = one_line(getattr(error, "orig", None) or error)
        raise DataError(f"{url} cannot be queried: {reason}; check the address and --query.") from None
    return copy


def _write(engine: Any, query: str, out: Any, name: str) -> None:
    options = {"stream_results": True, "yield_per": 1000, "no_parameters": True}
    count = 0
    try:
        with engine.connect() as connection:
            result = connection.execution_options(**options).exec_driver_sql(query)
            if not result.returns_rows:
                raise DataError(f"--query returns no rows from {name}; give one that begins with SELECT.")
            columns = list(result.keys())
            check_unique(f"the answer of {name}", columns)
            for row in result:
                count += 1
                out.write(json.dumps(dict(zip(columns, row, strict=True)), default=_text) + "\n")
    finally:
        engine.dispose()
    if not count:
        raise DataError(f"--query returns no rows from {name}; check its conditions.")


def _text(value: object) -> str:
    """Return a value that JSON does not have as text."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", errors="replace")
    return str(value)
