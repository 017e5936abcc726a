# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch

from pyro_rb.poutine.gaussian_site import Elements, GaussianSite, View


class RandomFactor(NamedTuple):
    """A random argument of a call, with what may be projected of it."""

    position: int
    view: View
    free: Elements

    @property
    def site(self) -> GaussianSite:
        return self.view.site

    @property
    def noise(self) -> torch.Tensor:
        """Of the argument; of the whole site, where elements go together."""
        draw = self.site.draw
        return self.view.replay(draw.noise) if draw.is_diagonal else draw.noise

    @property
    def free_scale(self) -> torch.Tensor:
        """The scale of a diagonal one, zero where nothing is projected."""
        scale = self.view.replay(self.site.draw.scale)
        return scale * self.free if isinstance(self.free, torch.Tensor) else scale

    def spread(self, noise: torch.Tensor) -> torch.Tensor:
        """The share of the argument that free noise has."""
        draw = self.site.draw
        if draw.is_diagonal:
            return self.free_scale * noise
        return self.view.replay(draw.spread(noise))

    def value(self, noise: torch.Tensor) -> torch.Tensor:
        """The argument, with other noise where it is free."""
        draw = self.site.draw
        if not draw.is_diagonal:
            return self.view.replay(draw.loc + draw.spread(noise))
        if isinstance(self.free, torch.Tensor):
            noise = torch.where(self.free, noise, self.noise)
        return self.view.replay(draw.loc) + self.view.replay(draw.scale) * noise
