# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Errors and warnings of models and losses, in a line each."""

import re
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

# Pyro adds the shapes at all sites to errors; what has been added after that is kept.
_TRACE_SHAPES = re.compile(r" ?Trace Shapes:.*?(?= The values of the guide sites|$)")


class WarningLog:
    """Warnings raised while losses run, each kept once, with all losses that raised it."""

    def __init__(self, log: List[Any]) -> None:
        self._sources: Dict[str, List[str]] = {}
        self._log = log

    @property
    def notes(self) -> List[str]:
        return [f"{', '.join(sources)}: {text}" for text, sources in self._sources.items()]

    def collect(self, source: str) -> None:
        for item in self._log:
            # As Python does by default: deprecations concern developers.
            if not issubclass(item.category, (DeprecationWarning, PendingDeprecationWarning)):
                sources = self._sources.setdefault(one_line(item.message), [])
                if source not in sources:
                    sources.append(source)
        self._log.clear()


def one_line(error: Any) -> str:
    """An exception or warning, with its type if an exception, on one line."""
    text = _TRACE_SHAPES.sub("", " ".join(str(error).split()))
    text = text if len(text) <= 300 else text[:297] + "..."
    if isinstance(error, Warning):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def counted(number: int, what: str) -> str:
    """
    A number of things.

    >>> counted(1, "draw"), counted(2, "draw")
    ('1 draw', '2 draws')
    """
    return f"{number} {what}{'s' * (number != 1)}"


@contextmanager
def recorded_warnings() -> Iterator[WarningLog]:
    """All warnings in the block go to the log."""
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        warned = WarningLog(log)
        yield warned
        warned.collect("model and guide")
