# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Every kind of guide that Pyro accepts, wide enough for a test of bias.

A guide narrower than the posterior hides a bias: the term that an estimator
drops by mistake is then small against its noise. So scales start near those of
the prior, and each parameter is moved off its symmetric starting point.
"""

import functools
from typing import Any, Callable, Dict, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import block_autoregressive, iterated, planar
from pyro.infer import autoguide
from pyro.nn import PyroModule

from tests.support.cases import Case
from tests.support.models import (
    CONJ_X,
    EXACT,
    conj_model,
    conj_nelbo,
    lognormal_model,
    mix_model,
    switch_model,
)

SITES = ("mu", "tau", "w", "th")


def move(case: Case, by: float = 0.1, seed: int = 1) -> Case:
    """Adds noise of scale ``by`` to every parameter."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for p in case.parameters().values():
            p.add_(by * torch.randn_like(p))
    return case


def auto(
    guide: Callable[..., Any], tapped: Any = (), model: Any = mix_model, **options: Any
) -> Callable[[], Case]:
    """An automatic guide of *mix*, or of another ``model`` of the same data."""

    def make() -> Case:
        x = torch.tensor(CONJ_X)
        return move(Case(model, guide(model, **options), (x,), tapped=tapped))

    return make


def auto_normal_exact() -> Case:
    """AutoNormal on a positive latent: Delta sites that carry a density. In the log
    coordinate it is the mean-field guide of conj."""
    x = torch.tensor(CONJ_X)
    guide = autoguide.AutoNormal(lognormal_model, init_scale=0.7)

    def exact_loss() -> torch.Tensor:
        return conj_nelbo(guide.locs.tau, guide.scales.tau, x).sum()

    return move(Case(lognormal_model, guide, (x,), exact_loss, {"tau_unconstrained"}))


def auto_guide_list() -> Case:
    """Two automatic guides, one for the global sites and one for the local ones."""
    x = torch.tensor(CONJ_X)
    guide = autoguide.AutoGuideList(mix_model)
    globals_, locals_ = (
        poutine.block(mix_model, expose=list(sites)) for sites in (SITES[:3], SITES[3:])
    )
    guide.append(autoguide.AutoMultivariateNormal(globals_, init_scale=0.4))
    guide.append(autoguide.AutoNormal(locals_, init_scale=0.6))
    names = {"_AutoGuideList.0_latent", "th_unconstrained"}
    return move(Case(mix_model, guide, (x,), tapped=names))


def auto_discrete_parallel() -> Case:
    """An AutoGuideList with a discrete part. Without enumeration, as in Trace_ELBO."""
    guide = autoguide.AutoGuideList(switch_model)
    z, k = (poutine.block(switch_model, expose=[site]) for site in "zk")
    guide.append(autoguide.AutoNormal(z, init_scale=0.9))
    guide.append(autoguide.AutoDiscreteParallel(k))
    sampled = poutine.infer_config(guide, lambda site: {"enumerate": None})
    return move(Case(switch_model, sampled, tapped={"z_unconstrained"}))


def auto_laplace_fitted() -> Case:
    """The AutoMultivariateNormal that AutoLaplaceApproximation returns has buffers,
    no parameters: nothing to train and nothing to tap."""
    x = torch.tensor(CONJ_X)
    delta = autoguide.AutoLaplaceApproximation(conj_model)
    delta(x)
    return Case(conj_model, delta.laplace_approximation(x), (x,))


class Encoder(torch.nn.Module):
    """x -> (loc, scale) of z, one pair an item."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)
        self.dropout = torch.nn.Dropout(dropout)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.5], [0.2]]))
            self.linear.bias.copy_(torch.tensor([0.3, -0.1]))

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        out = self.linear(self.dropout(x.unsqueeze(-1)))
        return out[..., 0], out[..., 1].exp()


def amortized() -> Case:
    """conj with an encoder registered by ``pyro.module``."""
    x, encoder = torch.tensor(CONJ_X), Encoder()

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)))

    def exact_loss() -> torch.Tensor:
        return conj_nelbo(*encoder(x), x).sum()

    return Case(conj_model, guide, (x,), exact_loss, {"z"})


def pyro_module() -> Case:
    """An amortized guide that is a PyroModule, with a PyroModule encoder inside."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = PyroModule[torch.nn.Linear](1, 2)

        def forward(self, x: torch.Tensor) -> None:
            out = self.encoder(x.unsqueeze(-1))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(out[..., 0], out[..., 1].exp()))

    x, guide = torch.tensor(CONJ_X), Guide()

    def exact_loss() -> torch.Tensor:
        out = guide.encoder(x.unsqueeze(-1))
        return conj_nelbo(out[..., 0], out[..., 1].exp(), x).sum()

    return move(Case(conj_model, guide, (x,), exact_loss, {"z"}))


class PlainGuide(torch.nn.Module):
    """An amortized guide that Pyro knows nothing about: no ``param`` site."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = Encoder(dropout)

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encoder(x)))


def plain_module() -> Case:
    x, guide = torch.tensor(CONJ_X), PlainGuide()

    def exact_loss() -> torch.Tensor:
        return conj_nelbo(*guide.encoder(x), x).sum()

    return Case(conj_model, guide, (x,), exact_loss, {"z"})


def dropout() -> Case:
    """Dropout in the encoder: a second run of the guide would draw another mask."""
    x, guide = torch.tensor(CONJ_X), PlainGuide(dropout=0.5)

    def registered(x: torch.Tensor) -> None:
        pyro.module("guide", guide)
        guide(x)

    return Case(conj_model, registered, (x,), tapped={"z"})


UNCONSTRAINED = frozenset(name + "_unconstrained" for name in SITES)

# Automatic guides, each on *mix* unless it needs another model.
AUTOGUIDES: Dict[str, Callable[[], Case]] = {
    "AutoNormal": auto(autoguide.AutoNormal, UNCONSTRAINED, init_scale=0.5),
    "AutoDiagonalNormal": auto(
        autoguide.AutoDiagonalNormal, {"_AutoDiagonalNormal_latent"}, init_scale=0.5
    ),
    "AutoMultivariateNormal": auto(
        autoguide.AutoMultivariateNormal, {"_AutoMultivariateNormal_latent"}, init_scale=0.5
    ),
    "AutoLowRankMultivariateNormal": auto(
        autoguide.AutoLowRankMultivariateNormal,
        {"_AutoLowRankMultivariateNormal_latent"},
        init_scale=0.4,
    ),
    "AutoIAFNormal": auto(
        autoguide.AutoIAFNormal,
        {"_AutoIAFNormal_latent"},
        conj_model,
        hidden_dim=[8],
        num_transforms=2,
    ),
    # Planar and block-autoregressive flows have no inverse in Pyro.
    "AutoNormalizingFlow_planar": auto(
        autoguide.AutoNormalizingFlow,
        {"_AutoNormalizingFlow_latent"},
        conj_model,
        init_transform_fn=functools.partial(iterated, 2, planar),
    ),
    "AutoNormalizingFlow_block": auto(
        autoguide.AutoNormalizingFlow,
        {"_AutoNormalizingFlow_latent"},
        conj_model,
        init_transform_fn=functools.partial(iterated, 1, block_autoregressive),
    ),
    "AutoGuideList": auto_guide_list,
    "AutoGuideList_discrete": auto_discrete_parallel,
    "AutoDelta": auto(autoguide.AutoDelta),
    "AutoLaplaceApproximation": auto(autoguide.AutoLaplaceApproximation),
    "AutoLaplaceApproximation_fitted": auto_laplace_fitted,
    # The noise of AutoStructured has no parameters.
    "AutoStructured": auto(
        autoguide.AutoStructured,
        conditionals={"mu": "normal", "tau": "normal", "w": "normal", "th": "mvn"},
        dependencies={"th": {"mu": "linear", "tau": "linear"}},
        init_scale=0.5,
    ),
    "AutoGaussian_dense": auto(
        autoguide.AutoGaussian, {"_AutoGaussianDense_latent"}, init_scale=0.5
    ),
    "AutoGaussian_funsor": auto(autoguide.AutoGaussian, backend="funsor", init_scale=0.5),
    "AutoNormalMessenger": auto(autoguide.AutoNormalMessenger, SITES, init_scale=0.5),
    "AutoHierarchicalNormalMessenger": auto(
        autoguide.AutoHierarchicalNormalMessenger, SITES, init_scale=0.5, init_weight=0.7
    ),
    "AutoRegressiveMessenger": auto(autoguide.AutoRegressiveMessenger, SITES, init_scale=0.6),
}

# Everything: the cases with exact answers, the module guides, the automatic guides.
GUIDES: Dict[str, Callable[[], Case]] = {
    **EXACT,
    "auto_normal": auto_normal_exact,
    "amortized": amortized,
    "pyro_module": pyro_module,
    "plain_module": plain_module,
    "dropout": dropout,
    **AUTOGUIDES,
}
