# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What an importance-weighted bound and its path gradient ask of a guide.
"""

from typing import Any

from pyro_rb.infer.traces import sample_sites


def check_reparameterized(guide_trace: Any) -> None:
    """
    :raises NotImplementedError: naming the site, if the guide needs a score function.
    """
    for name, site in sample_sites(guide_trace):
        score_function = site["score_parts"].score_function
        if getattr(score_function, "requires_grad", False):
            raise NotImplementedError(
                f"The guide draws site '{name}' from {type(site['fn']).__name__} without a "
                "(full) reparameterization, and its log_prob depends on a parameter. Expected "
                "a distribution with rsample; RenyiELBO would leave that parameter without a "
                "gradient. Enumerate or marginalize the site, fix its parameters, or use "
                "Trace_ELBO or STLTrace_ELBO, whose objective is the ELBO."
            )


def check_densities(guide_trace: Any) -> None:
    """
    :raises NotImplementedError: naming the site, if a draw says that its density is not
        known, by ``infer={"_no_density": ...}`` with the name of what drew it.
    """
    for name, site in sample_sites(guide_trace):
        sampler = site["infer"].get("_no_density")
        if sampler is not None:
            raise NotImplementedError(
                f"The guide draws site '{name}' by {sampler}, which does not know the density "
                "of its draws. Expected a guide that does, as importance weights need it. Use "
                f"Trace_ELBO with {sampler}, or the guide inside of it, its attribute 'guide', "
                "with DReG_ELBO."
            )
