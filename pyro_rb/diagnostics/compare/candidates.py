# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which losses are worth a trial on a model and guide: :func:`choose_losses`."""

from typing import Any, Callable, List, Mapping, Optional

from pyro_rb.diagnostics.compare.chooser import (
    LOCAL,
    NUM_PARTICLES,
    STL,
    Candidate,
    Choice,
    Chooser,
    is_treated,
)
from pyro_rb.diagnostics.run.arguments import Arguments
from pyro_rb.diagnostics.run.losses import ENUMERATED
from pyro_rb.diagnostics.run.problem import prepared

PARTICLES = f"num_particles={NUM_PARTICLES},vectorize_particles=True"


def candidates() -> List[Candidate]:
    """
    THE PLACE TO ADD A LOSS: all that may be compared by default, the simpler ones first. Those that
    this version of Pyro or pyro_rb does not have are passed over.
    """
    one_by_one = "it does not run with vectorized particles, which add a dimension on the left: "
    return [
        Candidate("TraceMeanField_ELBO", Chooser.no_mean_field, unless="mean field restriction"),
        Candidate("TraceGraph_ELBO", Chooser.no_graph, Chooser.hidden_dependence),
        Candidate(ENUMERATED, Chooser.no_enumeration),
        Candidate(STL, Chooser.sums_in_model, _untreated("path gradient", "the guide has no site whose score could "
                  "be removed")),  # fmt: skip
        Candidate(f"{STL}:1.0", Chooser.no_path_gradient),
        Candidate("R2G2_ELBO", Chooser.sums_in_model, Chooser.nothing_projected),
        Candidate(LOCAL, Chooser.nothing_local),
        Candidate("RaoBlackwellTopK_ELBO:budget=4", Chooser.no_discrete, Chooser.nothing_sampled),
        Candidate("RaoBlackwell_ELBO"),
        Candidate(f"Trace_ELBO:{PARTICLES}", Chooser.no_particles, Chooser.not_vectorized, hint=one_by_one),
        Candidate(f"{STL}:{PARTICLES}", lambda self: self.no_path_gradient() or self.no_particles(),
                  Chooser.not_vectorized, hint=one_by_one),  # fmt: skip
    ]


def choose_losses(
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    reference: Optional[str] = None,
) -> Choice:
    """
    Chooses losses by the traces of model and guide and by one evaluation of each candidate.
    Everything is left as it was found.

    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide.
    :param args: Positional arguments of model and guide.
    :param dict kwargs: Keyword arguments of model and guide.
    :param str reference: The loss that they will be compared to. With an
        importance-weighted bound, such as ``"RenyiELBO:alpha=0,num_particles=8"``, the
        candidates are those with the same objective. Default:
        :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` if the model enumerates a site, or
        ``Trace_ELBO`` is biased (see ``left_out`` of :class:`~pyro_rb.diagnostics.run.sites.Sites`),
        else :class:`~pyro.infer.trace_elbo.Trace_ELBO`.
    :rtype: Choice

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.)), 1.))
    >>> choice = choose_losses(model, guide)
    >>> choice.losses
    ['TraceMeanField_ELBO', 'STLTrace_ELBO', 'STLTrace_ELBO:1.0', 'RaoBlackwell_ELBO',
     'Trace_ELBO:num_particles=10,vectorize_particles=True',
     'STLTrace_ELBO:num_particles=10,vectorize_particles=True']
    >>> choice.left_out["RaoBlackwellTopK_ELBO:budget=4"]
    'the guide has no discrete site'
    """
    with prepared(model, guide, args, kwargs, must_match=False) as problem:
        return Chooser(problem).choose(candidates(), reference)


def _untreated(treatment: str, reason: str) -> Callable[[Any, Any], Optional[str]]:
    return lambda _, loss: None if is_treated(loss, treatment) else reason
