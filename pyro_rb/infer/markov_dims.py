# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Optional

from pyro.poutine.messenger import Messenger

from pyro_rb.infer.util import reserve_dims


class MarkovDims(Messenger):
    """
    Keeps enumeration dims of sites in :func:`pyro.markov` apart from those of sites outside.

    Pyro gives a site outside of it the next dim that no site outside has. If a site inside has
    it, one is taken for the other. It belongs inside of the handlers that enumerate.

    :param MarkovDims guide: that of the guide, if this is for a model.
    """

    def __init__(self, guide: Optional["MarkovDims"] = None) -> None:
        super().__init__()
        self._guide = guide
        self._leftmost = 0

    def __enter__(self) -> Any:
        self._leftmost = 0 if self._guide is None else self._guide._leftmost
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        may_enumerate = not (msg["is_observed"] or getattr(msg["fn"], "has_rsample", False))
        if self._leftmost and may_enumerate and msg["infer"].get("_markov_scope") is None:
            reserve_dims(self._leftmost)

    def _pyro_post_sample(self, msg: Any) -> None:
        self._leftmost = min(self._leftmost, msg["infer"].get("_enumerate_dim", 0))
