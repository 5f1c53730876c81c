"""How cells and sentences break where a terminal is narrow: between words, then after punctuation inside a word such as
``expandable_segments:True``, and anywhere only where even that does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

_PIECES = re.compile(r"[^_,:./]*[_,:./]+|[^_,:./]+")


def folded(text: str, width: int) -> list[str]:
    """The lines of ``text``, each at most ``width`` letters long."""
    return [line for written in text.splitlines() for line in _folded_line(written, width)]


def _folded_line(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if len(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        line = ""
        for piece in _PIECES.findall(word):
            if len(line) + len(piece) > width and line:
                yield line
                line = ""
            line += piece
            while len(line) > width:
                yield line[:width]
                line = line[width:]
    yield line


class Name:
    """A cell that holds a name: of a variant, a module, an operator."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(len, _PIECES.findall(self._text.replace(" ", "_"))), default=1)
        widest = max(map(len, self._text.splitlines()), default=1)
        return Measurement(longest, widest).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text("\n".join(folded(self._text, options.max_width)))


def hanging(line: str, width: int) -> list[str]:
    """An indented ``line`` with what is left of it indented further; another as it is."""
    indent = len(line) - len(line.lstrip())
    if not indent or len(line) <= width:
        return [line]
    first, *rest = folded(line.strip(), width - indent - 2)
    return [" " * indent + first, *(" " * (indent + 2) + each for each in rest)]
