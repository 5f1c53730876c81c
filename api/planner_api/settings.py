"""What an operator sets, by environment variables that begin with ``PLANNER_``."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from planner.targets import parse_prefixes


class Settings(BaseSettings):
    """Read once, when the service starts; never at import time."""

    model_config = SettingsConfigDict(env_prefix="PLANNER_", extra="ignore")

    store: str | None = None
    """Database URL; ``None`` = SQLite in the user's data folder."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    allowed_targets: str = ""
    """Comma-separated module prefixes whose code a spec that came over HTTP may name. Empty = none."""
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    """A spec is a page of text; a larger body is refused before it is read whole."""
    preflight_timeout_s: float = Field(default=120.0, gt=0)
    preflight_concurrency: int = Field(default=2, gt=0)
    """Predictions that run at the same time; each is a process with a CPU core's worth of work."""
    preflight_queue: int = Field(default=8, ge=0)
    """Predictions that may wait for their turn before the service answers ``too_busy``."""
    events_poll_s: float = Field(default=0.5, gt=0)
    """How often an open event stream asks the store for more."""

    @property
    def allowed_prefixes(self) -> tuple[str, ...]:
        return parse_prefixes(self.allowed_targets)
