# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import (
    Any,
    Collection,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
    Union,
)

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.util import torch_backward, torch_item
from pyro.poutine import Trace
from pyro.util import warn_if_nan

from pyro_rb.infer.left_out import left_out_by_trace_elbo
from pyro_rb.infer.outside_plates import Terms
from pyro_rb.infer.particle_baseline import Draw, compute_scores
from pyro_rb.infer.path_mixin import Groups, check_num_particles
from pyro_rb.infer.run import Run
from pyro_rb.infer.run_mixin import RunMixin
from pyro_rb.infer.surrogate import is_exactly, path_terms, rest_of
from pyro_rb.infer.traces import site_values
from pyro_rb.infer.weights import compute_elbo, weigh, without_value
from pyro_rb.ops.projection import SOLVERS
from pyro_rb.ops.quiet_grad import quiet_grad
from pyro_rb.poutine import TopKOptions

BASELINES = (None, "loo", "reinforce+")
#: Evaluations at a discrete site, and the most values that are all summed, where nothing is said of them.
BUDGET, SUM_UP_TO = 3, 32


class RaoBlackwell_ELBO(RunMixin, Trace_ELBO):
    r"""
    One loss for any model and guide: a :class:`~pyro.infer.Trace_ELBO` that chooses a method for
    each site of the guide. The objective and the mean of the gradient are those of ``Trace_ELBO``.

    .. list-table::
       :header-rows: 1

       * - Site of the guide
         - Treatment
         - Loss that does only this
       * - discrete, its values can be listed
         - few values are summed; of many, the likely ones are summed and others drawn [1]
         - :class:`~pyro_rb.infer.topk_elbo.RaoBlackwellTopK_ELBO`
       * - several such variables made one site by ``to_event``
         - the same with joint values, up to 65,536 of them
         - :class:`~pyro_rb.infer.topk_elbo.RaoBlackwellTopK_ELBO`
       * - a Bernoulli vector (by ``to_event``) with more values than are summed, and no ``k``,
           ``num_samples`` or ``budget`` that asks for some
         - an antithetic pair of draws [4]
         -
       * - without ``rsample`` or such a list, or with more ``draws``
         - ``draws`` independent draws, with a leave-one-out baseline
         -
       * - Gaussian, used by linear functions in the model
         - its noise is projected [2]; analytic KL term; and path gradient
         - :class:`~pyro_rb.infer.r2g2_elbo.R2G2_ELBO`
       * - other reparameterized draws
         - path gradient, with a learned scale [3]
         - :class:`~pyro_rb.infer.stl_elbo.STLTrace_ELBO`
       * - all else: :class:`~pyro.distributions.Delta`, supplied values
         - as ``Trace_ELBO`` does
         -

    All sites add to one surrogate loss. Each term of the ELBO has a weight, the product of the
    weights of the values at which it was evaluated, by ``pyro.infer.util.Dice``. A site whose score
    has a baseline, or is left out, passes on its density to earlier draws only. So the gradient
    has no noise at all where the guide is the posterior, if pre-activations are not drawn row by row,
    with ``control_variate_scale=1.0`` or the learned scale after its start. Without discrete sites
    there are no weights, and a step costs what a step of ``STLTrace_ELBO`` costs.

    At a projected site the path gradient is replaced by its conditional mean given the
    pre-activations. With :math:`\epsilon^*` as in ``R2G2_ELBO`` and the projection :math:`P`, this
    replaces :math:`\epsilon` by :math:`\epsilon^*`, and :math:`\epsilon^2` by
    :math:`\epsilon^{*2} + 1 - \operatorname{diag}(P P^\top)`, in the terms for which the KL divergence
    is analytic. With scale 0 the gradient is that of ``R2G2_ELBO``. With scale 1 it is the conditional
    mean of that of ``STLTrace_ELBO`` (given upstream draws, and where priors have no parameters).
    The learned scale is better than both. Conjugate gradients, which large layers need, do not give
    the diagonal. There only :math:`\epsilon` is replaced, and the squares are left out. Correlated
    sites are projected only.

    The loss looks for linear uses during the first 8 steps. If nothing could be projected, it looks
    again after 16, 32, 64 steps and so on, and when shapes, sites or the modes of modules change.

    **Requirements.** Any model and guide that ``Trace_ELBO`` accepts, if discrete sites may
    have one more dim on the left, as under parallel enumeration. ``infer={"topk": 0}`` asks
    for a plain draw. A site on which something outside its plates depends gets a single
    draw without being asked, and the full cost. Options of a site in the guide: ``infer={"topk": k}``
    or a dict of ``k``, ``num_samples``, ``budget``, ``sum_up_to``; ``infer={"draws": n}``;
    ``infer={"antithetic": True}``, for an even number of draws of Bernoulli variables, or False;
    ``infer={"rao_blackwell": False}``, which leaves the site to Pyro; ``infer={"enumerate": ...}`` and
    ``infer={"baseline": ...}`` as in Pyro.
    :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` tells what was done, and why.

    Inside :func:`torch.func.grad` nothing is projected. Sites that the model enumerates and
    ``infer={"baseline": ...}`` raise an error there.

    **When it is worse.** Sites that depend on one another are evaluated at all combinations of
    their values. A global site with several draws evaluates the whole model for each. Looking
    for linear uses takes time where there are some. Gradients are right to first
    order only.

    :param args: The positional arguments of :class:`~pyro.infer.Trace_ELBO`, in the same order.
    :param int k: number of values to sum, ``>= 0``. Defaults to None: ``budget`` decides.
    :param int num_samples: number of draws among the others, ``>= 1``. Defaults to None, likewise.
    :param int budget: number of evaluations at a discrete site, ``>= 1``, divided between sums and
        draws for each element. Defaults to 3, if neither of the two above is given.
    :param int sum_up_to: All values of a discrete site are summed if there are at most this many,
        ``>= 0``, whatever the three above say. They are not, as ``report()`` tells, where this would make
        more than 256 evaluations together with the values of earlier sites on which the site may
        depend, or more than 262,144 elements at a site (evaluations times the sizes of plates and
        of the event, such as an image). Defaults to 32, if none of the three is given, else to 0.
    :param str baseline: ``"loo"`` (the default), ``"reinforce+"`` or None, as in
        :class:`~pyro_rb.infer.topk_elbo.RaoBlackwellTopK_ELBO`.
    :param int draws: number of draws where values cannot be listed, ``>= 1``. Defaults to 2. Two
        draws of Bernoulli variables are antithetic if ``baseline`` is ``"loo"``; others are independent.
    :param control_variate_scale: As in :class:`~pyro_rb.infer.stl_elbo.STLTrace_ELBO`.
        Defaults to ``"adaptive"``.
    :param str pre_activations: ``"shared"`` projects, ``"local"`` draws pre-activations for each
        row (see :class:`~pyro_rb.infer.r2g2_elbo.R2G2_ELBO`), None does neither. ``"auto"``,
        the default, is ``"local"`` where rows are proven to have no effect on one another,
        and ``"shared"`` elsewhere.
    :param str solver: As in :class:`~pyro_rb.infer.r2g2_elbo.R2G2_ELBO`. Defaults to
        ``"auto"``.
    :param int max_evaluations: the largest number of combinations of values of the sites that a
        site of the model depends on. Defaults to 65536.
    :param int num_steps: After this many steps nothing is projected. Defaults to None: never stop.
    :param kwargs: The keyword arguments of :class:`~pyro.infer.Trace_ELBO`.
    :raises ValueError: naming the argument, if its value is invalid, or if ``budget`` is given
        together with ``k`` or ``num_samples``; at a step, naming the
        site, for invalid options of a site, and for too many combinations.
    :raises RuntimeError: at a step, if the value of a guide site was changed in place.
    :raises NotImplementedError: at a step inside :func:`torch.jit.trace`, and as said above.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        ...     with pyro.plate("data", len(data)):
        ...         z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        ...         pyro.sample("x", dist.Normal(loc[..., z], 1.0), obs=data)
        >>> def guide(data):
        ...     m = pyro.param("m", torch.tensor([-1.0, 0.0, 1.0]))
        ...     pyro.sample("loc", dist.Normal(m, 0.1).to_event(1))
        ...     with pyro.plate("data", len(data)):
        ...         logits = pyro.param("logits", torch.zeros(len(data), 3))
        ...         pyro.sample("z", dist.Categorical(logits=logits))
        >>> pyro.clear_param_store()
        >>> elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([-2.3, 1.8]))
        >>> print(elbo.report())
        site    treatment             reason
        ------  --------------------  --------------------
        loc     path gradient, c = 0  reparameterized draw
        z       exact                 3 of 3 values

    **References**

    [1] Runjing Liu, Jeffrey Regier, Nilesh Tripuraneni, Michael I. Jordan, Jon McAuliffe
    (2019), "Rao-Blackwellized Stochastic Gradients for Discrete Distributions".
    https://arxiv.org/abs/1810.04777

    [2] Kevin Lam, Thang Bui, George Deligiannidis, Yee Whye Teh (2025),
    "Rao-Blackwellized Reparameterization Gradients". https://arxiv.org/abs/2506.07687

    [3] Geoffrey Roeder, Yuhuai Wu, David Duvenaud (2017), "Sticking the Landing:
    Simple, Lower-Variance Gradient Estimators for Variational Inference".
    https://arxiv.org/abs/1703.09194

    [4] Zhe Dong, Andriy Mnih, George Tucker (2020), "DisARM: An Antithetic Gradient Estimator for
    Binary Latent Variables". https://arxiv.org/abs/2006.10680
    """

    #: Says in the report how a site is treated that no strategy accepts.
    otherwise = "as Trace_ELBO"
    #: What a user may have meant by a first argument that is no number.
    _own_option = "budget"
    _default_options = TopKOptions(budget=BUDGET, sum_up_to=SUM_UP_TO)
    _pre_activations: Tuple[Optional[str], ...] = ("auto", "shared", "local", None)

    def __init__(
        self,
        *args: Any,
        k: Optional[int] = None,
        num_samples: Optional[int] = None,
        budget: Optional[int] = None,
        sum_up_to: Optional[int] = None,
        baseline: Optional[str] = "loo",
        draws: int = 2,
        control_variate_scale: Union[float, str] = "adaptive",
        pre_activations: Optional[str] = "auto",
        solver: str = "auto",
        max_evaluations: int = 2**16,
        num_steps: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        self.options = TopKOptions.make(k, num_samples, budget, sum_up_to, self._default_options)
        _check("baseline", baseline, BASELINES)
        _check("pre_activations", pre_activations, self._pre_activations)
        _check("solver", solver, SOLVERS)
        _check_count("max_evaluations", max_evaluations)
        _check_count("draws", draws)
        if num_steps is not None:
            _check_count("num_steps", num_steps, "None, or ")
        self.baseline = baseline
        self.draws = draws
        #: Who says how many values to look at means those of Bernoulli vectors, too.
        self._draws_bits = draws > 1 and k is num_samples is budget is None
        self.pre_activations = pre_activations
        self.solver = solver
        self.max_evaluations = max_evaluations
        self.num_steps = num_steps
        self._init_scales(control_variate_scale)
        self._init_runs()
        super().__init__(*args, **kwargs)
        check_num_particles(self.num_particles, type(self).__name__, self._own_option)

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Any
    ) -> Tuple[Any, Any]:
        run: Run = guide_trace.run
        path, names = run.path, set(run.path_sites)
        if path is None or not (names or run.joint):
            return self._plain_particle(model_trace, guide_trace)
        # A site with plain score parts has the log density for its entropy term.
        log_q = {n: guide_trace.nodes[n]["log_prob_sum"] for n in path.values if n in names}
        log_q.update((n, sum(x.sum() for _, x in terms)) for n, terms in run.joint.items())
        groups = self._choose_scales(log_q, run)
        terms = path_terms(log_q, path, self._scales)
        for name in path.values:
            parts, term = guide_trace.nodes[name]["score_parts"], terms.get(name, 0.0)
            if name not in names:  # analytic
                term = term + parts.entropy_term.sum()
            if name in log_q:
                whole = 1.0 if name in names else 0.0
                if not is_exactly(self._scales[name], whole):
                    term = term + rest_of(self._scales[name], log_q[name], whole)
            guide_trace.nodes[name]["score_parts"] = parts._replace(entropy_term=term)
        loss, surrogate = self._plain_particle(model_trace, guide_trace)
        self._learn_scales(groups, log_q, surrogate, (model_trace, guide_trace))
        return loss, surrogate

    def _plain_particle(self, model_trace: Trace, guide_trace: Any) -> Tuple[Any, Any]:
        """By Pyro's loss, with what that leaves out."""
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        return loss, surrogate + left_out_by_trace_elbo(model_trace, guide_trace)

    def _choose_scales(self, log_q: Mapping[str, torch.Tensor], run: Run) -> Groups:
        """Returns what to learn of from this particle."""
        assert run.path is not None
        self._scales = run.scales
        terms = {name: [term] for name, term in log_q.items()}
        return self._find_scales(terms, run.path.nodes, run.may_learn)

    def _learn_scales(
        self, groups: Groups, log_q: Mapping[str, torch.Tensor], surrogate: Any, traces: Any
    ) -> None:
        if groups:
            path, between = traces[1].run.path, site_values(*traces)

            def compute_scores(parameters: Any) -> Any:
                terms = [term for term in log_q.values() if term.requires_grad]
                with path.closed():
                    return quiet_grad(terms, parameters, between=between)

            self._learn(groups, surrogate, compute_scores, between)

    def _weighted_particle(self, terms: Terms) -> Tuple[Any, Any, List[Draw]]:
        run: Run = terms.guide_trace.run
        weighted = weigh(terms, self._baselines, self._outside.dependents)
        surrogate = weighted.surrogate
        if run.path is not None and run.path.values:
            names = [*run.path_sites, *run.joint]
            log_q = {n: weighted.log_q[n] for n in names if n in weighted.log_q}
            groups = self._choose_scales(log_q, run)
            # The scores of all others are left out, as their mean is zero.
            scales: Dict[str, Any] = {**dict.fromkeys(weighted.log_q, 1.0), **self._scales}
            for name, term in log_q.items():
                whole = 0.0 if name in run.joint else 1.0
                if not is_exactly(scales[name], whole):
                    surrogate = surrogate - without_value(rest_of(scales[name], term, whole))
            for term in path_terms(weighted.log_q, run.path, scales).values():
                surrogate = surrogate - without_value(term)
            self._learn_scales(groups, log_q, -surrogate, terms[:2])
        return -torch_item(weighted.elbo), -surrogate, weighted.draws

    def _get_surrogates(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Any, Any, Terms, List[Tuple[int, Draw]]]]:
        """The loss of a run, its surrogate, and draws whose scores wait for other particles."""
        for particle, terms in self._get_terms(model, guide, args, kwargs):
            if not terms.costs:
                yield *self._differentiable_loss_particle(*terms[:2]), terms, []
                continue
            self._check_objective()
            if torch.is_grad_enabled():
                loss, surrogate, draws = self._weighted_particle(terms)
                yield loss, surrogate, terms, [(particle, draw) for draw in draws]
            else:
                loss = -compute_elbo(terms)
                yield torch_item(loss), loss, terms, []

    @property
    def _other_objective(self) -> Optional[type]:
        """A class among the bases, of others, that changes the loss of a pair of traces."""
        for cls in type(self).__mro__:
            is_known = cls.__module__.startswith(("pyro_rb.", "pyro.infer."))
            if "_differentiable_loss_particle" in vars(cls) and not is_known:
                return cls
        return None

    def _check_objective(self) -> None:
        other = self._other_objective
        if other is not None:
            raise NotImplementedError(
                f"Found {type(self).__name__}, whose loss {other.__name__} changes, and sites with several "
                f"values, whose loss does not pass through {other.__name__}. Expected STLTrace_ELBO or R2G2_ELBO "
                f"among the bases, or infer={{'rao_blackwell': False}} at these sites."
            )

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """:return: an estimate of the loss (minus the ELBO)."""
        elbo: Any = 0.0
        for _, terms in self._get_terms(model, guide, args, kwargs):
            if terms.costs:
                self._check_objective()
                elbo += torch_item(compute_elbo(terms))
            elif self._other_objective is not None:
                elbo -= self._differentiable_loss_particle(*terms[:2])[0]
            else:
                elbo += torch_item(terms.model_trace.log_prob_sum())
                elbo -= torch_item(terms.guide_trace.log_prob_sum())
        loss = -elbo / self.num_particles
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :return: an estimate of the loss (minus the ELBO), a scalar tensor. Its first
            derivatives are estimates of those of the loss; its higher derivatives are not.
        """
        loss: Any = 0.0
        total: Any = 0.0
        waiting = []
        with self._step():
            for particle, surrogate, _, draws in self._get_surrogates(model, guide, args, kwargs):
                loss += particle / self.num_particles
                total += surrogate / self.num_particles
                waiting += draws
        total -= compute_scores(waiting) / self.num_particles
        warn_if_nan(total, "loss")
        return loss + (total - torch_item(total))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of the loss (minus the ELBO). An estimate of its gradient is
            added to the ``.grad`` of the parameters.
        """
        loss: Any = 0.0
        kept: Any = 0.0
        waiting = []
        with self._step():
            for particle, surrogate, terms, draws in self._get_surrogates(
                model, guide, args, kwargs
            ):
                loss += particle / self.num_particles
                nodes: List[Any] = [n for trace in terms[:2] for n in trace.nodes.values()]
                if not any(site["type"] == "param" for site in nodes):
                    continue
                surrogate = surrogate / self.num_particles
                if draws:
                    kept += surrogate
                    waiting += draws
                else:
                    # Sites that are enumerated in a loop share a graph.
                    shares_graph = terms.costs and any("_enum_total" in n.get("infer", {}) for n in nodes)
                    torch_backward(surrogate, retain_graph=shares_graph or self.retain_graph)
        kept -= compute_scores(waiting) / self.num_particles
        torch_backward(kept, retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def _trace_enum(self) -> TraceEnum_ELBO:
        return TraceEnum_ELBO(
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            strict_enumeration_warning=False,
        )

    def compute_marginals(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``TraceEnum_ELBO.compute_marginals``, with plain draws from the guide."""
        return self._trace_enum().compute_marginals(model, guide, *args, **kwargs)

    def sample_posterior(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``TraceEnum_ELBO.sample_posterior``, with plain draws from the guide."""
        return self._trace_enum().sample_posterior(model, guide, *args, **kwargs)


def _check(name: str, value: Any, accepted: Collection[Any]) -> None:
    if not (value is None or isinstance(value, str)) or value not in accepted:
        names = ", ".join(map(repr, accepted))
        raise ValueError(f"Invalid {name}: {value!r}. Expected one of {names}.")


def _check_count(name: str, value: Any, other: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"Invalid {name}: {value!r}. Expected {other}an integer that is at least 1."
        )
