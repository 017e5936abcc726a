# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict, List, Optional, Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample

SUPPLIED = "its value was supplied, not drawn"


class Declined(Exception):
    """Says why a strategy leaves a site to the next one."""


class Strategy:
    """How to draw a latent site of a guide. One object serves one run of guide and model."""

    def begin(self) -> None:
        """Is called whenever the guide starts, from the beginning or from a partial trace."""

    def draw(self, msg: Any, handler: "DrawMessenger") -> str:
        """
        Puts a value in ``msg["value"]``.

        :return: what there is to say of it in the report.
        :raises Declined: with the reason, if the site is not for this strategy.
        """
        raise NotImplementedError

    def settle(self, site: Any) -> bool:
        """
        Is told a site that it drew, as it is in the trace of the guide.

        :return: whether the value is one that was drawn here.
        """
        return True


class UnseenEnumMessenger(EnumMessenger):
    """
    An ``EnumMessenger`` whose look at the shape of values is no use of them.

    :raises ValueError: naming the site, if its values are along a dim that another site in
        its scope has, which would be taken for it.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        own_dim, params = msg["infer"].get("_enumerate_dim"), self._param_dims.get(msg["name"], {})
        own_id = msg["infer"].get("_dim_to_id", {}).get(own_dim)
        if own_id is not None and params.get(own_dim, own_id) != own_id:
            raise ValueError(
                f"The values of site '{msg['name']}' are along dim {own_dim}, as are those of an "
                "earlier site that it may depend on by pyro.markov. Expected as much history in "
                "the guide as in the model: pyro.markov(..., history=...)."
            )
        with torch._C.DisableTorchFunction():
            super()._pyro_post_sample(msg)


class DrawMessenger(UnseenEnumMessenger):
    """
    Draws each latent site of a guide by the first of several strategies that accepts it, so that
    all other handlers see the value that the model gets.

    Sites that no strategy accepts are left to Pyro, and so are those whose value was supplied. This
    handler belongs outside of all others, which have then made their changes to a site's
    distribution.

    :param strategies: in the order in which they are asked.
    :param int first_available_dim: as for
        :class:`~pyro.poutine.enum_messenger.EnumMessenger`. None (default) if no site is
        to be enumerated.

    >>> import pyro, pyro.distributions as dist
    >>> with DrawMessenger([]) as handler:
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> handler.drawn_by
    {'z': None}
    """

    def __init__(
        self, strategies: Sequence[Strategy], first_available_dim: Optional[int] = None
    ) -> None:
        super().__init__(first_available_dim)
        self.strategies = strategies
        #: Latent sites in the order of the guide, with the strategy that drew them.
        self.drawn_by: Dict[str, Optional[Strategy]] = {}
        #: What there is to say of each.
        self.reasons: Dict[str, str] = {}
        self._fns: Dict[str, Any] = {}  # the distributions of those that were drawn

    def __enter__(self) -> Any:
        self.drawn_by, self.reasons = {}, {}
        for strategy in self.strategies:
            strategy.begin()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_latent(msg):
            self.enumerate(msg)
            return
        name = msg["name"]
        if msg["done"] or msg["value"] is not None:
            self.drawn_by[name] = None
            self.reasons[name] = SUPPLIED
            self.enumerate(msg)
        else:
            self.draw(msg)

    def draw(self, msg: Any) -> None:
        """Offers a latent site to the strategies, which may have a draw of it already."""
        name = msg["name"]
        self.drawn_by[name] = None
        reasons: List[str] = []
        strategies = self.strategies
        is_wanted = msg["infer"].get("rao_blackwell", True)
        if not isinstance(is_wanted, bool):
            raise ValueError(
                f"Invalid infer={{'rao_blackwell': {is_wanted!r}}} at guide site '{name}'. "
                "Expected True or False."
            )
        if not is_wanted:
            strategies, reasons = [], ["infer={'rao_blackwell': False}"]
        for strategy in strategies:
            try:
                self.reasons[name] = strategy.draw(msg, self)
                self.drawn_by[name] = strategy
                self._fns[name] = msg["fn"]
                self.enumerate(msg)  # keeps account of dims, also of sites with one draw
                return
            except Declined as e:
                reasons.append(str(e))
                if self.first_available_dim is not None and msg["infer"].get("enumerate"):
                    break  # Its draws, if reparameterized, have weights, and are Pyro's.
        # The first strategy is for draws without rsample, the last for all others.
        has_rsample = msg["fn"].has_rsample
        unasked = "reparameterized" if has_rsample else ""
        self.reasons[name] = reasons[-1 if has_rsample else 0] if reasons else unasked
        self.enumerate(msg)

    def settle(self, trace: Any) -> None:
        """
        Lets go of sites whose value in the trace of the guide is not the one that was drawn.

        :param Trace trace: of the guide, made under this messenger.
        :raises NotImplementedError: if a site has another distribution there.
        """
        for name in trace.stochastic_nodes:
            self.reasons.setdefault(name, "a handler around the loss hides it")
        for name, strategy in self.drawn_by.items():
            if strategy is None:
                continue
            site = trace.nodes.get(name)
            if site is None or not strategy.settle(site):
                self.drawn_by[name] = None
                is_inner = self.first_available_dim is not None
                self.reasons[name] = SUPPLIED if is_inner else "a handler has replaced its value"
            elif site["fn"] is not self._fns[name] and not site["infer"].get("_enum_total"):
                fn = type(self._fns[name]).__name__
                raise NotImplementedError(
                    f"A handler around the loss replaced the distribution of guide site '{name}', "
                    f"of type {fn}, after its value was drawn. Expected a handler around the "
                    "guide: SVI(model, handler(guide), ...)."
                )

    def enumerate(self, msg: Any) -> None:
        """What :class:`~pyro.poutine.enum_messenger.EnumMessenger` does at a site."""
        if self.first_available_dim is not None:
            if msg["infer"].get("num_samples") is not None:
                # Else draws are paired with those of earlier sites, on which they depend.
                msg["infer"] = {**msg["infer"], "expand": True}
            super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.first_available_dim is not None:
            super()._pyro_post_sample(msg)


def _is_latent(msg: Any) -> bool:
    return not (
        msg["is_observed"]
        or site_is_subsample(msg)
        or msg["infer"].get("_do_not_trace")
        or not isinstance(msg["fn"], TorchDistributionMixin)
    )
