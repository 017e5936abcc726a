# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Errors and warnings of models and losses, in a line each, and numbers in words."""

import math
import re
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

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


def with_error(value: Optional[float], error: Optional[float]) -> str:
    """
    A value with its standard error, if it has one.

    >>> with_error(0.162, 0.021), with_error(1.0, None)
    ('0.16 +/- 0.02', '1.00')
    """
    if value is None or error is None or not math.isfinite(error):
        return number(value)
    if abs(value) < 0.1:
        return f"{value:.2g} +/- {error:.1g}"
    digits = 0 if error >= 1 else 1 if error >= 0.1 else 2
    # Rounded up: an error of 0.00 would promise too much.
    return f"{value:.{digits}f} +/- {max(error, 10.0**-digits):.{digits}f}"


def number(value: Optional[float]) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def percent(share: Optional[float]) -> str:
    """
    >>> percent(0.0123), percent(3.75)
    ('1.2%', '375%')
    """
    if share is None or not math.isfinite(share):
        return "-"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"
