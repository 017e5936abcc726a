# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Hashable, Set

#: So many runs in which nothing was projected come before a pause.
NUM_LOOKS = 8
#: After so many structures, each with shapes of its own, a new one is no reason to look again.
MAX_STRUCTURES = 64


class Pause:
    """
    Decides whether the functions of PyTorch are watched for linear uses of Gaussian values:
    not where a number of runs had none that was projected.

    In a pause the 16th such run, the 32nd and so on are watched; and the next ones after a
    run of a structure that was not seen in them. Decided before anything is drawn, it
    can have no bias.

    >>> pause = Pause()
    >>> for _ in range(NUM_LOOKS):
    ...     pause.note("structure", is_watched=True, is_used=False)
    >>> pause.is_on
    True
    >>> pause.note("other structure", is_watched=False, is_used=False)
    >>> pause.is_on
    False
    """

    def __init__(self) -> None:
        self._num_idle = 0  # runs in which nothing was projected
        self._structures: Set[Hashable] = set()  # of those that were watched

    @property
    def is_on(self) -> bool:
        """Whether the next run is not watched."""
        return not self._is_watched(self._num_idle + 1)

    def looks_within(self, num_runs: int) -> bool:
        """Whether one of the next runs is watched, though those before had nothing."""
        first = self._num_idle + 1
        return first > 1 and any(map(self._is_watched, range(first, first + num_runs)))

    def skip(self, num_runs: int) -> None:
        """Counts runs that were as the last one."""
        self._num_idle += num_runs if self._num_idle else 0

    @staticmethod
    def _is_watched(n: int) -> bool:
        return n <= NUM_LOOKS or n & (n - 1) == 0 or n % 1024 == 0

    def note(self, structure: Hashable, is_watched: bool, is_used: bool) -> None:
        """
        Is told of a run.

        :param structure: by which the run is known.
        :param is_used: whether anything was projected in it.
        """
        self._num_idle += 1
        if is_used:
            self._num_idle = 0
            self._structures.discard(structure)
        elif structure not in self._structures and len(self._structures) < MAX_STRUCTURES:
            self._num_idle = int(is_watched)
            if is_watched:
                self._structures.add(structure)
