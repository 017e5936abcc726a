# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a test model is: :class:`Case`, and shorthands to write one."""

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, FrozenSet, Optional, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch.distributions import kl_divergence

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass
class Case:
    """One model and guide.

    :param exact_loss: the negative ELBO at the live parameters, a scalar tensor.
    :param tapped: names of the guide sites that have a path gradient: drawn by
        ``rsample`` from parameters, not Delta, with an invertible transform.
    :param subsamples: the indices of each subsample that its plate may take: noise that more particles do not lessen.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: Tuple[Any, ...] = ()
    exact_loss: Optional[Callable[[], torch.Tensor]] = None
    tapped: FrozenSet[str] = frozenset()
    vectorizable: bool = True
    subsamples: Tuple[Tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        self.tapped = frozenset(self.tapped)
        # A first run makes the parameters. Lazy guides run the model themselves.
        with torch.no_grad():
            poutine.trace(self.guide).get_trace(*self.args)
            poutine.trace(poutine.block(self.model)).get_trace(*self.args)

    def parameters(self) -> Dict[str, torch.Tensor]:
        """Every unconstrained leaf of the param store, the model and the guide."""
        named = list(pyro.get_param_store().named_parameters())
        for module in (self.model, self.guide):
            if isinstance(module, torch.nn.Module):
                named.extend(module.named_parameters())
        found: Dict[int, Tuple[str, torch.Tensor]] = {}
        for name, p in named:
            found.setdefault(id(p), (name, p))  # one tensor may have two names
        return dict(found.values())

    def exact_gradient(self) -> Dict[str, torch.Tensor]:
        """The gradient of :attr:`exact_loss`, keyed as :meth:`parameters`."""
        assert self.exact_loss is not None
        parameters = self.parameters()
        grads = torch.autograd.grad(
            self.exact_loss(), list(parameters.values()), allow_unused=True
        )
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), grads)
        }


def real(name: str, *value: float) -> torch.Tensor:
    """A parameter on the real line; a vector if more than one value is given."""
    return pyro.param(name, lambda: _tensor(value))


def positive(name: str, *value: float) -> torch.Tensor:
    """A parameter on the positive half line."""
    return pyro.param(name, lambda: _tensor(value), constraint=constraints.positive)


def _tensor(value: Tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(value[0] if len(value) == 1 else value)


def normal_kl(m: Any, s: Any, m0: Any, s0: Any) -> torch.Tensor:
    """KL(N(m, s) || N(m0, s0)), elementwise."""
    m, s, m0, s0 = map(torch.as_tensor, (m, s, m0, s0))
    return kl_divergence(dist.Normal(m, s), dist.Normal(m0, s0))


def normal_nll(square: Any, s: Any) -> torch.Tensor:
    """E[-log N(x; z, s)], given ``square = E[(x - z)^2]``."""
    return square / (2 * torch.as_tensor(s) ** 2) + torch.as_tensor(s).log() + HALF_LOG_2PI
