# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors of real data, of ``papers/stl/families.py`` and ``benchmarks/flow_training.py``."""

import pyro
import pyro.distributions as dist
import torch

from pyro_rb.diagnostics.cli.examples import EIGHT_SCHOOLS_EFFECTS, EIGHT_SCHOOLS_ERRORS


def centred_schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        errors = torch.tensor(EIGHT_SCHOOLS_ERRORS)
        pyro.sample("effect", dist.Normal(theta, errors), obs=torch.tensor(EIGHT_SCHOOLS_EFFECTS))


def logistic():
    """Malignant tumours by 30 features, with one scale for all weights; None without scikit-learn."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        return None
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.get_default_dtype())
    x = (x - x.mean(0)) / x.std(0)
    y = torch.tensor(data.target, dtype=x.dtype)

    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(1.0)).unsqueeze(-1)
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0)).unsqueeze(-1)
        w = pyro.sample("w", dist.Normal(0.0, scale.expand(scale.shape[:-1] + (30,))).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=w @ x.t() + bias).to_event(1), obs=y)

    return model
