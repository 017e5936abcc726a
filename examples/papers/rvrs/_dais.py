# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro's differentiable annealed importance sampling, for the logistic regression of ``logistic.py``."""

import math
import sys


def fit_dais(features, labels, num_steps_inside, lr, args, seed):
    """
    :param int num_steps_inside: steps of annealing, each with a gradient of the model.
    :return: the ELBO, and its standard error.
    """
    try:
        import jax
        import numpyro
        import numpyro.distributions as dist
        from numpyro.infer import SVI, Trace_ELBO
        from numpyro.infer.autoguide import AutoDAIS
    except ImportError as error:
        sys.exit(f'--dais needs {error.name}, which is not installed: pip install "pyro_rb[benchmarks]".')
    features, labels = features.cpu().numpy(), labels.cpu().numpy()

    def model():
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([features.shape[1]]).to_event(1))
        with numpyro.plate("rows", len(labels)):
            numpyro.sample("label", dist.Bernoulli(logits=features @ weights), obs=labels)

    guide = AutoDAIS(model, K=num_steps_inside, eta_max=1.0)
    # The rate falls to a hundredth, as in the other fits.
    optim = numpyro.optim.Adam(lambda step: lr * 0.01 ** (step / args.num_steps))
    svi = SVI(model, guide, optim, Trace_ELBO())
    params = svi.run(jax.random.PRNGKey(seed), args.num_steps, progress_bar=False).params

    def loss(key):
        return Trace_ELBO().loss(key, params, model, guide)

    keys = jax.random.split(jax.random.PRNGKey(seed + 1), args.num_samples)
    bounds = -jax.lax.map(loss, keys, batch_size=1000)
    return bounds.mean().item(), bounds.std().item() / math.sqrt(args.num_samples)
