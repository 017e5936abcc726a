# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_rb.ops.family import GAUSSIANS, find_changes, find_family, strip_independent
from pyro_rb.ops.gaussian import GaussianDraw
from pyro_rb.ops.graph import iter_reached
from pyro_rb.poutine.gaussian_site import (
    Elements,
    GaussianSite,
    Plain,
    View,
    join,
    overlap,
    without,
)
from pyro_rb.poutine.linear_use_mode import LinearUseMode
from pyro_rb.poutine.projected_use import ProjectionOptions


class R2G2Messenger(Messenger):
    """
    Draws the Gaussian sites of a guide, and conditions their noise on the results of the
    linear functions that guide and model use them in.

    Wrap the guide by :meth:`guide` and the model by :meth:`model`, and run them once,
    under :func:`pyro.poutine.trace`. What was done is in :attr:`sites`. If a site is
    ``violated``, the gradients of the run are biased: run again, with the same random
    numbers and the ``violated`` elements among the ``plain`` ones.

    :param ProjectionOptions options: how to project.
    :param plain: by name and shape, elements of sites that are not to be projected.
    :param str reason: why nothing is to be projected, if so.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> x, loc = torch.ones(1, 2), torch.zeros(2, requires_grad=True)
        >>> scale = torch.ones(2, requires_grad=True)
        >>> def guide():
        ...     return pyro.sample("w", dist.Normal(loc, scale).to_event(1))
        >>> handler = R2G2Messenger(ProjectionOptions())
        >>> z = handler.guide(lambda: x @ guide())()
        >>> z.sum().backward()
        >>> bool(scale.grad[0] == scale.grad[1])  # each is the mean of the two
        True
    """

    def __init__(
        self,
        options: ProjectionOptions,
        plain: Optional[Mapping[Tuple, Plain]] = None,
        reason: str = "",
    ) -> None:
        super().__init__()
        self._mode = LinearUseMode(options, reason)
        self._plain = {} if plain is None else plain
        self._draws_here = False
        self._needs_gradient = torch.is_grad_enabled()
        self._drawn: Dict[str, Tuple[Any, torch.Tensor, Optional[GaussianSite]]] = {}
        #: Sites of the guide that this handler drew, by name.
        self.sites = self._mode.sites
        #: What it did not draw, and why.
        self.reasons: Dict[str, str] = {}
        #: Names in the order of the guide.
        self.order: Dict[str, int] = {}
        self._projected_in_guide: Dict[str, Elements] = {}

    def guide(self, fn: Callable) -> Callable:
        """Wraps the guide."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._draws_here = True
            try:
                with self, self._mode:
                    return fn(*args, **kwargs)
            finally:
                self._draws_here = False
                self._projected_in_guide = {
                    name: site.projected for name, site in self.sites.items()
                }

        return run

    def model(self, fn: Callable) -> Callable:
        """Wraps the model."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._mode:
                return fn(*args, **kwargs)

        return run

    def find(self, value: Any) -> Optional[View]:
        """What is known of a tensor: the site, and which of its elements it shows."""
        return self._mode.find(value)

    def _pyro_sample(self, msg: Any) -> None:
        if not self._draws_here or msg["is_observed"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        self.order[name] = len(self.order)
        if msg["done"] or msg["value"] is not None:
            self.reasons[name] = "its value was supplied, not drawn"
        elif msg["infer"].get("_do_not_trace"):
            self.reasons[name] = "its density is that of another site"
        elif find_family(fn) is None:
            self.reasons[name] = _why_not_gaussian(fn)
        elif self._needs_gradient and not torch.is_grad_enabled():
            self.reasons[name] = "drawn without gradient"
        else:
            draw, site = GaussianDraw(fn), None
            if not draw.value.requires_grad and self._needs_gradient:
                self.reasons[name] = "depends on no parameter"
            else:
                plain = self._plain.get((name, draw.shape), Plain(None, ""))
                site = GaussianSite(name, draw, plain)
            self._drawn[name] = fn, draw.value, site
            msg["value"] = draw.value

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._drawn:
            return
        fn, value, site = self._drawn.pop(name)
        if msg["value"] is not value:  # by a handler around this one
            self.reasons[name] = "its value was supplied, not drawn"
        elif msg["fn"] is not fn:
            raise NotImplementedError(
                f"A handler around the loss replaced the distribution of guide site {name!r}, "
                f"{fn}, after its value was drawn. Expected a handler around the guide: "
                "SVI(model, handler(guide), ...)."
            )
        elif site is not None:
            self._mode.add_site(site, value)

    def note_hidden_uses(self, terms: Mapping[Any, Tuple[Any, List[Any]]]) -> None:
        """
        Notes uses that no PyTorch function showed: of compiled code, say.

        :param terms: for each site of guide and model its value, and the tensors that
            are differentiated for it. That these depend on the value is no use of it.
        """
        nodes = {
            (v.tensor.grad_fn, v.tensor.output_nr): v
            for v in self._mode.views
            if v.tensor.grad_fn is not None
        }
        seen: set = set()
        for value, roots in terms.values():
            own = self.find(value)
            # What is seen from a site's own value must be looked at again from others.
            visited = seen if own is None else set()
            for view in iter_reached(roots, nodes, visited):
                site, elements = view.site, view.elements
                is_news = (
                    overlap(elements, site.projected) is not None
                    or without(elements, site.used) is not None
                )
                if view is not own and is_news:
                    site.use(elements, "not seen (a use outside of PyTorch functions)")

    def note_score_functions(self) -> None:
        """
        Notes that the guide has score functions: their factor, the log density of all
        sites, depends on more of the noise than uses in the guide condition on.
        """
        for name, projected in self._projected_in_guide.items():
            if projected is not None:
                self.sites[name].violate(projected, "guide of a score-function site")

    @property
    def violated(self) -> Dict[Tuple, Plain]:
        """By name and shape, all elements that may not be projected after all."""
        return {
            site.key: Plain(join(site.plain, site.violated), "; ".join(site.reasons))
            for site in self.sites.values()
            if site.violated is not None
        }


def _why_not_gaussian(fn: Any) -> str:
    base = strip_independent(fn)
    for family in GAUSSIANS:
        if isinstance(base, family):
            changes = find_changes(base, family)
            if changes:
                return f"not Gaussian ({type(base).__name__} has its own {', '.join(changes)})"
    return "not Gaussian"
