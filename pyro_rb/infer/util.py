# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The one place that touches Pyro's private names.
"""

from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK


def is_replayed() -> bool:
    """
    Whether the code runs inside of a handler that may supply values of sample sites,
    so that a guide's values need not be draws of its distributions.

    >>> import pyro
    >>> is_replayed()
    False
    >>> with pyro.poutine.replay(trace=pyro.poutine.Trace()):
    ...     is_replayed()
    True
    """
    return any(isinstance(frame, ReplayMessenger) for frame in _PYRO_STACK)
