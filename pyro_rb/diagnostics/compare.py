# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which loss gives the best gradients for the time it takes? :func:`compare` measures it."""

import copy
import time
import warnings
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Union

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import PyroOptim
from pyro.util import set_rng_seed
from tqdm import tqdm

import pyro_rb
from pyro_rb.diagnostics.choose import Choice, Chooser, has_elbo
from pyro_rb.diagnostics.gradients import GradientSampler
from pyro_rb.diagnostics.losses import Losses, make_loss, make_losses
from pyro_rb.diagnostics.mean_test import z_threshold
from pyro_rb.diagnostics.measure import Plan, WarningLog
from pyro_rb.diagnostics.parameters import (
    Arguments,
    check_parameters,
    check_sites,
    parameters_of,
    run_traces,
)
from pyro_rb.diagnostics.report import Comparison
from pyro_rb.diagnostics.sites import settle_plates
from pyro_rb.diagnostics.state import preserve_state
from pyro_rb.diagnostics.study import Study

#: How long to go on for a relative error at most, where nothing else is said.
DEFAULT_SECONDS = 600.0


def compare(
    model: Callable,
    guide: Callable,
    losses: Optional[Losses] = None,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 300,
    num_burn_in: int = 100,
    train_steps: Union[int, Sequence[int]] = 0,
    optim: Optional[PyroOptim] = None,
    seed: int = 0,
    failure_rate: float = 1e-3,
    title: Optional[str] = None,
    progress: bool = True,
    reference: Optional[str] = None,
    rel_error: Optional[float] = None,
    max_seconds: Optional[float] = None,
) -> Comparison:
    """
    Compares losses on a model and guide: is the gradient unbiased, how large is its
    variance, what does it cost? And which loss is to be recommended?

    All losses are measured in turn at the same parameters and with the same random numbers
    draw by draw, against a reference, which is always measured:
    :class:`~pyro.infer.trace_elbo.Trace_ELBO` unless you say otherwise. ``variance x time``
    is the time that a loss needs to estimate the gradient as well as another;
    ``result.recommendation`` weighs the states, by the rule in
    :mod:`~pyro_rb.diagnostics.recommend`.

    Bias is tested against the exact gradient where all latent variables are discrete and
    few enough to be enumerated, and else against the reference's, draw by draw;
    ``result.settings["reference_gradient"]`` says which.

    The param store, the random number generators and the modules are left as they were
    found, see :func:`~pyro_rb.diagnostics.state.preserve_state`. A loss that cannot run on
    this model and guide gets a row that says why.

    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide whose sample sites match the model's.
    :param losses: Names such as ``"STLTrace_ELBO"`` (see
        :func:`~pyro_rb.diagnostics.losses.make_loss`), ELBO instances, or a dict of either by
        name. Instances are copied. Default: those that apply, see
        :func:`~pyro_rb.diagnostics.choose.choose_losses`; ``result.left_out`` says why the
        others do not.
    :param args: Positional arguments of model and guide; or a function without arguments that
        returns them. It is called before each step, for a new minibatch, whose noise then counts
        in all variances; the time that it takes counts as well. It must draw by the generators
        of torch, numpy or random, so that all losses see the same.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of gradients of each loss at each state, at least 2. With
        ``rel_error``, the least number.
    :param int num_burn_in: Number of gradients that are drawn first and thrown away, from
        which adaptive losses learn.
    :param train_steps: With ``n`` steps the losses are measured before, halfway (after
        ``n // 2`` steps) and after training by the reference. A list of steps says exactly
        when to measure. Default: 0, only the parameters as they are.
    :param ~pyro.optim.optim.PyroOptim optim: Optimizer for the training. Default: Adam with
        learning rate 0.01. It is copied.
    :param int seed: Seed, between 0 and 2**32 - 1.
    :param float failure_rate: Probability that any of the losses is called biased by chance.
    :param str title: Heading of the table.
    :param bool progress: Whether to show a progress bar on stderr.
    :param str reference: Name of the loss that the others are compared to. Losses with
        another objective than it appear as biased; so compare importance-weighted bounds
        to ``"RenyiELBO:alpha=0,num_particles=8"`` or the like. Default:
        :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` if the model enumerates a site,
        else ``Trace_ELBO``.
    :param float rel_error: Go on sampling at each state until the standard error of each
        variance ratio is at most this share of it. Default: take ``num_samples``.
    :param float max_seconds: Stop sampling after this time, with at least two gradients at
        each state; training is not cut short. The states share the time. Results then
        depend on the speed of the machine. Default: no limit, or 600 with ``rel_error``.
    :returns: A :class:`~pyro_rb.diagnostics.report.Comparison`: prints as a table, shows as
        one in notebooks, has ``recommendation``, ``to_dict()``, ``to_html()`` and ``plot()``.
    :raises ValueError: If sites do not match, there is no parameter, a loss is unknown, an
        argument is out of range, or the reference itself cannot run.
    :raises ComparisonInterrupted: On Ctrl-C. It is a :class:`KeyboardInterrupt` that has
        what was measured until then.

    The test of bias has little power where the gradient is very noisy; the column *detects*
    tells how large a bias would have been noticed. Variances are those at frozen
    parameters; they tell nothing about the path of training.

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0., 1.))
    ...     pyro.sample("x", dist.Normal(z, 1.), obs=x)
    >>> result = compare(model, AutoNormal(model), ["TraceMeanField_ELBO"],
    ...                  args=(torch.tensor(0.7),), num_samples=20, progress=False)
    >>> [loss.name for loss in result.states[0].losses]
    ['Trace_ELBO', 'TraceMeanField_ELBO']
    """
    kwargs = dict(kwargs or {})
    steps = _steps(train_steps)
    plan = _plan(num_samples, num_burn_in, rel_error, max_seconds)
    if optim is None:
        optim = PyroOptim(torch.optim.Adam, {"lr": 0.01})
    if not isinstance(optim, PyroOptim):
        raise TypeError(
            f"optim: expected a pyro.optim.PyroOptim such as pyro.optim.Adam, got {optim!r}"
        )
    z_threshold(failure_rate)  # fails early
    if losses is not None:
        make_losses(losses)
    if reference is not None:
        if not isinstance(reference, str):
            raise TypeError(
                "reference: expected the name of a loss, such as 'Trace_ELBO:num_particles=4', "
                f"got {reference!r}"
            )
        make_loss(reference)
    with preserve_state(model, guide), _recorded_warnings() as warned:
        set_rng_seed(seed)
        traces = run_traces(model, guide, args, kwargs)
        check_sites(traces)
        parameters, any_site = parameters_of(traces, model, guide)
        check_parameters(parameters)

        def sampler(loss: Any) -> GradientSampler:
            settle_plates(loss, traces)
            return GradientSampler(loss, model, guide, args, kwargs, parameters, any_site)

        chooser = Chooser(model, guide, traces, sampler)
        choice = Choice(reference or chooser.reference(), [], {})
        if losses is None:
            choice = chooser.choose(reference)
        rounds = (num_samples + num_burn_in) * len(steps) + steps[-1]
        # delay: an error at the start should not follow half a progress bar.
        with tqdm(
            desc=title, total=rounds, disable=not progress, leave=False, delay=1, mininterval=0.5
        ) as bar:
            study = Study(
                reference=choice.reference,
                losses=choice.losses if losses is None else losses,
                sampler=sampler,
                scored=bool(chooser.sites.scored),
                exact=has_elbo(choice.reference) and chooser.is_exact(),
                steps=steps,
                optim=copy.deepcopy(optim),
                plan=plan,
                seed=seed,
                failure_rate=failure_rate,
                bar=bar,
                warned=warned,
            )
            study.run()

    if not study.states:
        raise ComparisonInterrupted(None)
    compared = study.states[0].losses[0].bias_z is not None
    result = Comparison(
        title=title or f"{_describe(model)} with guide {_describe(guide)}",
        states=study.states,
        parameters={name: list(tensor.shape) for name, tensor in parameters.items()},
        settings={
            "reference": choice.reference,
            "reference_gradient": (
                "the exact gradient, by enumeration"
                if compared
                else f"{choice.reference}, draw by draw"
            ),
            "num_samples": num_samples,
            "num_burn_in": num_burn_in,
            "rel_error": rel_error,
            "max_seconds": max_seconds,
            "seed": seed,
            "failure_rate": failure_rate,
            "bias_threshold": study.threshold,
            "optim": f"{_describe(optim.pt_optim_constructor)}({optim.pt_optim_args})",
            "device": str(next(iter(parameters.values())).device),
            "num_threads": torch.get_num_threads(),
            "pyro_rb": pyro_rb.__version__,
            "pyro": pyro.__version__,
            "torch": str(torch.__version__),
        },
        notes=study.notes
        + _explanations(study, chooser.sites.jacobians)
        + warned.notes,
        left_out=choice.left_out,
        training=study.windows(),
        interrupted=study.interrupted,
    )
    if study.interrupted:
        raise ComparisonInterrupted(result)
    return result


class ComparisonInterrupted(KeyboardInterrupt):
    """
    The user has pressed Ctrl-C in :func:`compare`.

    :param Comparison partial: What was measured until then, in ``partial``; None if that is
        nothing.
    """

    def __init__(self, partial: Optional[Comparison]) -> None:
        super().__init__("the comparison was interrupted")
        self.partial = partial


def _explanations(study: Study, jacobians: List[str]) -> List[str]:
    """Reasons for results that would surprise."""
    biased = {row.name for state in study.states for row in state.losses if row.biased}
    return [
        f"{name} is biased on this guide: Pyro's KL divergence of a Delta leaves out its "
        f"log_density, here the Jacobian of {', '.join(map(repr, jacobians))}."
        for name, loss in make_losses(study.losses).items()
        if name in biased and jacobians and isinstance(loss, TraceMeanField_ELBO)
    ]


def _plan(
    num_samples: int, num_burn_in: int, rel_error: Optional[float], max_seconds: Optional[float]
) -> Plan:
    for name, count in (("num_samples", num_samples), ("num_burn_in", num_burn_in)):
        if not isinstance(count, int):
            raise TypeError(f"{name}: expected an integer, got {count!r}")
    if num_samples < 2 or num_burn_in < 0:
        raise ValueError(
            "expected num_samples >= 2 and num_burn_in >= 0, "
            f"got num_samples={num_samples} and num_burn_in={num_burn_in}"
        )
    for name, value in (("rel_error", rel_error), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    if max_seconds is None and rel_error is not None:
        max_seconds = DEFAULT_SECONDS
    deadline = None if max_seconds is None else time.perf_counter() + max_seconds
    return Plan(num_samples, num_burn_in, rel_error, deadline)


@contextmanager
def _recorded_warnings() -> Iterator[WarningLog]:
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        warned = WarningLog(log)
        yield warned
        warned.collect("model and guide")


def _steps(train_steps: Union[int, Sequence[int]]) -> List[int]:
    listed = list(train_steps) if isinstance(train_steps, Sequence) else [train_steps]
    if not listed or any(not isinstance(n, int) or n < 0 for n in listed):
        raise ValueError(
            f"train_steps: expected an integer >= 0 or a list of such, got {train_steps!r}"
        )
    if isinstance(train_steps, int):
        listed = [0, train_steps // 2, train_steps]
    return sorted(set(listed))


def _describe(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
