"""Jinja2 templates and how figures are written in them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

from fastapi.templating import Jinja2Templates

from planner import __version__
from planner.units import GIB, format_bytes

templates: Final = Jinja2Templates(directory=Path(__file__).parent / "templates")


def _gib(count: int | None) -> str:
    return "–" if count is None else f"{count / GIB:.2f}"


def _seconds(value: float | None) -> str:
    """A step time: milliseconds below a second."""
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _when(value: datetime | None) -> str:
    return "–" if value is None else value.strftime("%Y-%m-%d %H:%M")


templates.env.filters.update(gib=_gib, seconds=_seconds, rate=_rate, when=_when, size=format_bytes)
templates.env.globals["version"] = __version__
