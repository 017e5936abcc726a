# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Numbers, names and tables as text that fits the terminal."""

import math
import os
import shutil
import textwrap
from typing import Dict, List, Optional, Sequence

from tabulate import tabulate


def width() -> int:
    """Of the terminal, within reason."""
    return max(60, min(shutil.get_terminal_size((110, 24)).columns, 140))


def fitted(rows: Sequence[Sequence[str]], headers: Sequence[str], align: Sequence[str]) -> str:
    """As a table, without the last columns if it would be wider than the terminal. Long names are broken."""
    rows = [[broken(row[0]), *row[1:]] for row in rows]
    for count in range(len(headers), 1, -1):
        table = tabulate(
            [row[:count] for row in rows],
            headers[:count],
            tablefmt="simple",
            disable_numparse=True,
            colalign=align[:count] if rows else None,
        )
        if max(map(len, table.splitlines())) <= width():
            break
    return table


def broken(name: str) -> str:
    """The arguments of a loss go to lines of their own if there are many."""
    class_name, colon, rest = name.partition(":")
    return name if len(name) <= 34 else f"{class_name}{colon}\n  " + rest.replace(",", ",\n  ")


def left_then_right(headers: Sequence[str]) -> List[str]:
    return ["left"] + ["right"] * (len(headers) - 1)


def wrapped(text: str) -> List[str]:
    return textwrap.wrap(text, width(), subsequent_indent="  ", break_on_hyphens=False)


def short_names(names: Sequence[str]) -> List[str]:
    """Names of parameters without what all of them begin with."""
    # Pyro joins a module's name and its parameter's by $$$.
    names = [name.replace("$$$", ".") for name in names]
    start = os.path.commonprefix([name[: name.rfind(".") + 1] for name in names])
    start = start[: start.rfind(".") + 1]
    return [name[len(start) :] for name in names]


def shares(shares: Dict[str, float], most: int = 2) -> str:
    """The parameters with most of the variance."""
    if not shares:
        return "none: it has no noise"
    ranked = sorted(zip(shares.values(), short_names(list(shares))), reverse=True)
    shown = [f"{name} {percent(share)}" for share, name in ranked[:most] if share > 0.005]
    # A long name leaves no room for a second.
    return ", ".join(shown if len(", ".join(shown)) <= 26 else shown[:1]) or f"{len(ranked)} alike"


def with_error(value: Optional[float], error: Optional[float]) -> str:
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
    if share is None or not math.isfinite(share):
        return "-"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"
