# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Names and tables as text that fits the terminal."""

import os
import shutil
import textwrap
from typing import Dict, List, Sequence

from tabulate import tabulate

from pyro_rb.diagnostics.run.messages import percent


def width() -> int:
    """Of the terminal, within reason."""
    return max(60, min(shutil.get_terminal_size((110, 24)).columns, 140))


def fitted(rows: Sequence[Sequence[str]], headers: Sequence[str], align: Sequence[str]) -> str:
    """
    As a table. If it would be wider than the terminal, headers are broken, then the last columns left out, and named
    below. Long names are broken.
    """
    rows = [[broken(row[0]), *row[1:]] for row in rows]
    short = [textwrap.fill(header, 8) for header in headers]
    for count, shown in [(len(headers), headers), *((n, short) for n in range(len(headers), 1, -1))]:
        lines = tabulate(
            [row[:count] for row in rows],
            shown[:count],
            tablefmt="simple",
            disable_numparse=True,
            colalign=align[:count] if rows else None,
        ).splitlines()
        if max(map(len, lines)) <= width():
            break
    if count < len(headers):
        lines += ["", *wrapped(f"A wider terminal also shows: {', '.join(headers[count:])}.")]
    return "\n".join(lines)


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
