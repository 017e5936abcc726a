# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Mapping, Tuple

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger


class FramesMessenger(Messenger):
    """
    Puts sample sites into plates by name, without making the plates: no dim is allocated, no
    subsample site is made, and nothing is broadcast.

    :param frames: the plates of each site, as found in the ``cond_indep_stack`` of
        another trace.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> with FramesMessenger({"z": trace.nodes["z"]["cond_indep_stack"]}):
        ...     with pyro.poutine.trace() as copy:
        ...         z = pyro.sample("z", dist.Delta(torch.zeros(3)))
        >>> copy.trace.nodes["z"]["cond_indep_stack"][0].name
        'data'
    """

    def __init__(self, frames: Mapping[str, Tuple[CondIndepStackFrame, ...]]) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: Any) -> None:
        frames = self.frames.get(msg["name"], ())
        msg["cond_indep_stack"] = tuple(frames) + msg["cond_indep_stack"]
