# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from pyro.distributions.torch_distribution import MaskedDistribution

from pyro_rb.ops.family import GAUSSIANS, find_changes, find_family, strip_independent
from pyro_rb.ops.gaussian import GaussianDraw
from pyro_rb.ops.graph import iter_reached
from pyro_rb.poutine.draw_messenger import Declined, DrawMessenger, Strategy
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
from pyro_rb.poutine.path_gradient import PathGradient
from pyro_rb.poutine.projected_use import ProjectionOptions


class Projection(Strategy):
    """
    Draws the Gaussian sites of a guide. While ``mode`` is on, it conditions their noise on the
    results of the linear functions that guide and model use them in.

    What was done is in :attr:`sites`. If elements of a site are ``violated``, the gradients of the
    run are biased: run again, with the same random numbers and with these elements among the
    ``plain`` ones.

    :param ProjectionOptions options: how to project.
    :param plain: by name and shape, elements of sites that are not to be projected.
    :param str reason: the reason, if nothing is to be projected.
    :param path: what taps the draws that are not projected. With it, nothing is projected in the
        guide. None (default) taps nothing.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> x, loc = torch.ones(1, 2), torch.zeros(2, requires_grad=True)
        >>> scale = torch.ones(2, requires_grad=True)
        >>> projection = Projection(ProjectionOptions())
        >>> with DrawMessenger([projection]), projection.mode:
        ...     z = x @ pyro.sample("w", dist.Normal(loc, scale).to_event(1))
        >>> z.sum().backward()
        >>> bool(scale.grad[0] == scale.grad[1])  # each is the mean of the two
        True
    """

    def __init__(
        self,
        options: ProjectionOptions,
        plain: Optional[Mapping[Tuple, Plain]] = None,
        reason: str = "",
        path: Optional[PathGradient] = None,
    ) -> None:
        #: Watches the functions of PyTorch.
        self.mode = LinearUseMode(options, reason)
        self.local = options.local
        self._plain = {} if plain is None else plain
        self._path = path
        self._needs_gradient = torch.is_grad_enabled()
        #: Sites of the guide that were drawn here, by name.
        self.sites = self.mode.sites
        self._projected_in_guide: Dict[str, Elements] = {}

    def begin(self) -> None:
        self.mode.forget()

    def draw(self, msg: Any, handler: DrawMessenger) -> str:
        name, fn = msg["name"], msg["fn"]
        if find_family(fn) is None:
            raise Declined(_why_not_gaussian(fn))
        if self._needs_gradient and not torch.is_grad_enabled():
            raise Declined("drawn without gradient")
        draw = GaussianDraw(fn)
        msg["value"] = draw.value
        if not draw.value.requires_grad and self._needs_gradient:
            raise Declined("depends on no parameter")
        reason = ""
        if self._path is not None:
            reason = self._path.inspect(msg)
            msg["value"] = draw.value = self._path.tap(name, draw.value)
        plain = self._plain.get((name, draw.shape), Plain(None, ""))
        self.mode.add_site(GaussianSite(name, draw, plain), draw.value)
        return reason

    def settle(self, site: Any) -> bool:
        name = site["name"]
        is_tapped = self._path is not None and self._path.settle(site)
        if site["value"] is self.sites[name].draw.value:
            return True
        del self.sites[name]
        return is_tapped

    @property
    def has_path(self) -> bool:
        """Whether what is not projected has a path gradient."""
        return self._path is not None

    def leaves_to_path(self, site: GaussianSite) -> bool:
        """Whether a site has a path gradient, since none of it was projected."""
        return self.has_path and site.projected is None

    def watch(self, fn: Callable, is_guide: bool = False) -> Callable:
        """Wraps guide or model, so that uses of the values are seen in it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.mode.projects = self._path is None or not is_guide
            with self.mode:
                result = fn(*args, **kwargs)
            if is_guide:
                self._projected_in_guide = {n: s.projected for n, s in self.sites.items()}
            return result

        return run

    def find(self, value: Any) -> Optional[View]:
        """What is known of a tensor: the site, and which of its elements it shows."""
        return self.mode.find(value)

    def note_hidden_uses(self, terms: Mapping[Any, Tuple[Any, List[Any]]]) -> None:
        """
        Notes uses that no PyTorch function showed: of compiled code, say.

        :param terms: for each site of guide and model its value, and the tensors that
            are differentiated for it. That these depend on the value is no use of it.
        """
        nodes = {
            (v.tensor.grad_fn, v.tensor.output_nr): v
            for v in self.mode.views
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
    if isinstance(base, MaskedDistribution):
        return "a masked distribution; use poutine.mask in its place"
    for family in GAUSSIANS:
        if isinstance(base, family):
            changes = find_changes(base, family)
            if changes:
                return f"not Gaussian ({type(base).__name__} has its own {', '.join(changes)})"
    return "not Gaussian"
