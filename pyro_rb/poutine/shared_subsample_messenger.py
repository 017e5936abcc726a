# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


class SharedSubsampleMessenger(Messenger):
    """
    Gives each subsampling plate, in every run within the context, the subsample that it drew in its
    first run. Subsamples that the user supplies are left alone.

    Example::

        >>> import pyro
        >>> def draw():
        ...     return pyro.plate("data", 1000, subsample_size=3).indices
        >>> with SharedSubsampleMessenger():
        ...     bool((draw() == draw()).all())
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: Dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and site_is_subsample(msg):
            msg["value"] = self._drawn.get(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._drawn.setdefault(msg["name"], msg["value"])
