"""Store URLs: what users write, checked and normalised, and how a message may name a store without its password."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from planner.errors import StoreError

_POSTGRESQL = {"postgresql", "postgres"}
_SECRET_QUERY_KEYS = ("password", "sslpassword")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store is."""

    url: URL
    """With the driver that the planner uses: the standard library's sqlite3, or psycopg 3."""

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path | None:
        """The SQLite file; ``None`` on PostgreSQL."""
        return Path(self.url.database or "") if self.is_sqlite else None

    @property
    def label(self) -> str:
        """The store as messages name it: no user, password or options."""
        if self.is_sqlite:
            return f"sqlite:///{self.path}"
        port = f":{self.url.port}" if self.url.port else ""
        return f"postgresql://{self.url.host or ''}{port}/{self.url.database or ''}"

    def redact(self, text: str) -> str:
        """``text`` without this address's passwords, should a driver have quoted one."""
        queried = [self.url.query.get(key) for key in _SECRET_QUERY_KEYS]
        for secret in (self.url.password, *queried):
            for part in (secret,) if isinstance(secret, str) else secret or ():
                text = text.replace(part, "***") if part else text
        return text


def default_path() -> Path:
    """``planner.db`` in the user's data folder."""
    return Path(platformdirs.user_data_dir("planner", appauthor=False)) / "planner.db"


def parse_address(url: str | None) -> Address:
    """The address that ``url`` means; ``None`` is the SQLite file in the user's data folder.

    Raises ``StoreError`` that never repeats a URL with a password in it.
    """
    if url is None:
        return Address(URL.create("sqlite", database=str(default_path())))
    scheme, separator, _ = url.partition("://")
    backend = scheme.partition("+")[0].lower()
    if not separator:
        # Without "://" it holds no "user:password@host" either, so it may be repeated.
        raise StoreError(f"{url!r} is not a store URL", field="store", suggestion=f"sqlite:///{url or 'plans.db'}")
    if backend not in {"sqlite", *_POSTGRESQL}:
        shown = scheme if re.fullmatch(r"[\w+.-]+", scheme) else "the URL's scheme"
        raise StoreError(
            f"{shown} is not supported; the store is sqlite:///FILE or postgresql://HOST/DATABASE", field="store"
        )
    try:
        parsed = make_url(url)
        if backend in _POSTGRESQL:
            return Address(parsed.set(drivername="postgresql+psycopg"))
    except (ArgumentError, ValueError):
        # The parser quotes the part that it could not read, which may be the password: not repeated, not chained.
        raise StoreError(
            f"the {backend} URL cannot be read; write {backend}://USER:PASSWORD@HOST:PORT/DATABASE, with special"
            " characters percent-encoded",
            field="store",
        ) from None
    return Address(_sqlite(parsed))


def _sqlite(parsed: URL) -> URL:
    if parsed.host:
        raise StoreError(
            "a SQLite URL has three slashes before a relative path, four before an absolute one",
            field="store", suggestion=f"sqlite:///{parsed.host}{'/' + parsed.database if parsed.database else ''}",
        )  # fmt: skip
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        raise StoreError("the store must be a file, for example sqlite:///plans.db", field="store")
    return URL.create("sqlite", database=parsed.database)
