# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict

import torch
from pyro.distributions import Distribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_rb.ops.provenance import Provenance

#: All reparameterized draws together.
OTHER = ""


class ProvenanceMessenger(Messenger):
    """
    Marks the values of latent sites as sources of what is computed from them: by name,
    if they have a score function or are enumerated, and all others as ``OTHER``.

    :param ~pyro_rb.ops.provenance.Provenance provenance: the context that follows them.

    >>> import pyro, torch, pyro.distributions as dist
    >>> with Provenance() as provenance, ProvenanceMessenger(provenance):
    ...     z = pyro.sample("z", dist.Bernoulli(torch.ones(3) / 2))
    ...     x = z.cumsum(0)
    >>> provenance.names(provenance.sources(x))
    ['z']
    """

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance
        #: For each site, sources of the numbers that Python had read before it.
        self.read: Dict[str, int] = {}

    def __enter__(self) -> Any:
        self.provenance.read = 0
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        # Numbers that are read from now on are none of this program's.
        self.provenance.read = 0
        super().__exit__(*exc)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        read = self.read[msg["name"]] = self.provenance.read
        if not msg["is_observed"]:
            is_source = msg["infer"].get("enumerate") or _has_score(msg["fn"])
            own = self.provenance.source(msg["name"] if is_source else OTHER)
            with torch._C.DisableTorchFunction():  # it is no use of the value
                self.provenance.add(msg["value"], read | own)


def _has_score(fn: Any) -> bool:
    # A sampler by rejection has part of a score.
    is_partly = type(fn).score_parts is not Distribution.score_parts
    return is_partly or not getattr(fn, "has_rsample", False)
