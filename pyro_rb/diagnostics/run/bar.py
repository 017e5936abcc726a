# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Progress bars: :func:`bar`, and :class:`TimedBar` for work of several kinds."""

import sys
import time
from typing import Any, Dict, Optional

from tqdm import tqdm


def bar(show: bool, *args: Any, **kwargs: Any) -> tqdm:
    """
    A progress bar on stderr, in terminals and notebooks only: files keep no bars.

    :param bool show: Whether to show it at all.

    **Example**

    >>> list(bar(False, range(2)))
    [0, 1]
    """
    is_seen = "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())
    return tqdm(*args, disable=not (show and is_seen), leave=False, mininterval=0.5, **kwargs)


class TimedBar:
    """
    A progress bar for units of several kinds, each weighed by the time that it has taken so far.

    :param dict counts: How many units of each kind there are to be.
    :param dict guess: For each kind, its time in terms of that of the first, until one is measured.

    **Example**

    >>> with TimedBar(False, None, {"round": 10, "step": 5}, {"step": 0.5}) as bar:
    ...     bar.update("round")
    >>> bar.done["round"], 0 < bar.fraction <= 1
    (1, True)
    """

    def __init__(self, show: bool, title: Optional[str], counts: Dict[str, int], guess: Dict[str, float]) -> None:
        self.counts, self.done = dict(counts), dict.fromkeys(counts, 0)
        self._guess = guess
        self._seconds = dict.fromkeys(counts, 0.0)
        self._last = time.perf_counter()
        # delay: an error at the start should not follow half a progress bar.
        self._bar = bar(
            show, desc=title, total=1.0, delay=1, smoothing=0, miniters=0,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}",  # fmt: skip
        )

    def __enter__(self) -> "TimedBar":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def start(self) -> None:
        """What took time until now belongs to no unit."""
        self._last = time.perf_counter()

    def update(self, kind: str) -> None:
        """One more unit is done."""
        now = time.perf_counter()
        self._seconds[kind] += now - self._last
        self._last = now
        self.done[kind] += 1
        if not self._bar.disable:
            self._bar.update(max(0.0, self.fraction - self._bar.n))

    @property
    def fraction(self) -> float:
        """The share of the time that is over, as far as can be told."""
        first = next(iter(self.counts))
        known = {kind: self._seconds[kind] / n for kind, n in self.done.items() if n}
        base = known.get(first) or 1.0
        cost = {kind: known.get(kind, self._guess.get(kind, 1.0) * base) for kind in self.counts}
        total = sum(cost[kind] * max(n, self.done[kind]) for kind, n in self.counts.items())
        return sum(cost[kind] * n for kind, n in self.done.items()) / total if total > 0 else 0.0
