# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.util import site_is_subsample

from pyro_rb.poutine.draw_messenger import UnseenEnumMessenger
from pyro_rb.poutine.topk_strategy import TopK
from pyro_rb.poutine.topk_table import GatherCategorical


class TopKModelMessenger(UnseenEnumMessenger):
    """
    The handler for a model that runs after a guide with :class:`TopK` sites. It bounds the
    cartesian product of slots, and makes Categorical priors cheap.

    :param TopK guide: the strategy of the guide.

    >>> from pyro_rb.poutine import DrawMessenger, TopKOptions
    >>> import pyro, torch, pyro.distributions as dist
    >>> topk = TopK(TopKOptions(k=1))
    >>> with DrawMessenger([topk], first_available_dim=-1):
    ...     z = pyro.sample("z", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
    >>> with TopKModelMessenger(topk), pyro.poutine.condition(data={"z": z}):
    ...     pyro.sample("z", dist.Categorical(torch.ones(3))).shape
    torch.Size([2])
    """

    def __init__(self, guide: TopK) -> None:
        super().__init__()
        self._guide = guide

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], TorchDistributionMixin) and not site_is_subsample(msg):
            if self._guide.enumerated:
                self._guide.room.check_product(msg["name"], msg["fn"].batch_shape)
                self._guide.room.check_elements(msg["name"], msg["fn"])
            if any(msg["name"] == site.name for site in self._guide.enumerated):
                msg["fn"] = GatherCategorical.of(msg["fn"])
        super()._pyro_sample(msg)
