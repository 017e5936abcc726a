# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor, is_identically_zero
from pyro.poutine import Trace

from pyro_rb.infer.traces import sample_sites


def left_out_by_trace_elbo(model_trace: Trace, guide_trace: Trace) -> Any:
    """
    What Pyro's ``Trace_ELBO`` lacks in its surrogate loss at sites with a score function: the cost that sites of the
    guide alone have, such as an auxiliary label, and the gradient of a scale. Its value is of no meaning.

    :return: a scalar tensor, or 0 if nothing is left out.
    """
    scored = [
        site for _, site in sample_sites(guide_trace) if not is_identically_zero(site["score_parts"].score_function)
    ]
    if not scored:
        return 0
    surrogate: Any = 0
    alone = [site for name, site in sample_sites(guide_trace) if name not in model_trace.nodes]
    log_q = MultiFrameTensor(*((site["cond_indep_stack"], site["log_prob"].detach()) for site in alone))
    for site in scored:
        if log_q:
            surrogate = surrogate + (log_q.sum_to(site["cond_indep_stack"]) * site["score_parts"].score_function).sum()
        if getattr(site["scale"], "requires_grad", False):
            fixed = site["unscaled_log_prob"].detach()
            surrogate = surrogate + scale_and_mask(fixed, site["scale"], site["mask"]).sum()
    return surrogate
