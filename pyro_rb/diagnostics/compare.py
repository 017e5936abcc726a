# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which loss gives the best gradients for the time it takes? :func:`compare` measures it."""

import copy
import warnings
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Union,
)

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import PyroOptim
from pyro.util import set_rng_seed
from tqdm import tqdm

import pyro_rb
from pyro_rb.diagnostics import stats
from pyro_rb.diagnostics.gradients import GradientSampler, draw_seeds
from pyro_rb.diagnostics.losses import (
    DEFAULT_LOSSES,
    REFERENCE,
    Losses,
    make_loss,
    make_losses,
)
from pyro_rb.diagnostics.measure import Gauge, WarningLog, measure, one_line
from pyro_rb.diagnostics.parameters import (
    check_parameters,
    check_sites,
    parameters_of,
    run_traces,
)
from pyro_rb.diagnostics.report import Comparison, StateResult
from pyro_rb.diagnostics.state import preserve_state


def compare(
    model: Callable,
    guide: Callable,
    losses: Optional[Losses] = None,
    args: Sequence = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 300,
    num_burn_in: int = 100,
    train_steps: Union[int, Sequence[int]] = 0,
    optim: Optional[PyroOptim] = None,
    seed: int = 0,
    failure_rate: float = 1e-3,
    title: Optional[str] = None,
    progress: bool = True,
    reference: str = REFERENCE,
) -> Comparison:
    """
    Compares losses on a model and guide: is the gradient unbiased, how large is its
    variance, what does it cost?

    All losses are measured in turn at the same parameters and with the same random numbers
    draw by draw, against a reference, which is always measured:
    :class:`~pyro.infer.trace_elbo.Trace_ELBO` unless you say otherwise. ``variance x time``
    is what counts: the time that a loss needs to estimate the gradient as well as another.

    The param store, the random number generators and the modules are left as they were
    found, see :func:`~pyro_rb.diagnostics.state.preserve_state`. A loss that cannot run on
    this model and guide gets a row that says why.

    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide whose sample sites match the model's.
    :param losses: Names such as ``"STLTrace_ELBO:adaptive"`` (see
        :func:`~pyro_rb.diagnostics.losses.make_loss`), ELBO instances, or a dict of either by
        name. Instances are copied. Default: Trace_ELBO, TraceMeanField_ELBO, and
        STLTrace_ELBO with ``control_variate_scale`` 1 and ``"adaptive"``.
    :param args: Positional arguments of model and guide.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of gradients of each loss at each state, at least 2.
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
        to ``"RenyiELBO:alpha=0,num_particles=8"`` or the like.
    :returns: A :class:`~pyro_rb.diagnostics.report.Comparison`: prints as a table, has
        ``to_dict()`` and ``plot()``.
    :raises ValueError: If sites do not match, there is no parameter, a loss is unknown, an
        argument is out of range, or the reference itself cannot run.

    The test of bias has little power where the gradient is very noisy; the column *sees*
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
    if num_samples < 2 or num_burn_in < 0:
        raise ValueError(
            "expected num_samples >= 2 and num_burn_in >= 0, "
            f"got num_samples={num_samples} and num_burn_in={num_burn_in}"
        )
    if optim is None:
        optim = PyroOptim(torch.optim.Adam, {"lr": 0.01})
    if not isinstance(optim, PyroOptim):
        raise TypeError(
            f"optim: expected a pyro.optim.PyroOptim such as pyro.optim.Adam, got {optim!r}"
        )
    chosen: Losses = DEFAULT_LOSSES if losses is None else losses
    make_loss(reference)  # fails early
    others = [name for name in make_losses(chosen) if name != reference]
    with preserve_state(model, guide), _recorded_warnings() as warned:
        set_rng_seed(seed)
        traces = run_traces(model, guide, args, kwargs)
        check_sites(traces)
        parameters, any_site = parameters_of(traces, model, guide)
        check_parameters(parameters)

        def sampler(loss: Any) -> GradientSampler:
            return GradientSampler(loss, model, guide, args, kwargs, parameters, any_site)

        size = sum(tensor.numel() for tensor in parameters.values())
        num_tests = size * max(1, len(others)) * len(steps)
        threshold = stats.z_threshold(failure_rate, num_tests, num_samples)
        trainer, optim, done = sampler(make_loss(reference)), copy.deepcopy(optim), 0
        states: List[StateResult] = []
        rounds = (num_samples + num_burn_in) * len(steps) + steps[-1]
        # delay: an error at the start should not follow half a progress bar.
        with tqdm(
            desc=title, total=rounds, disable=not progress, leave=False, delay=1, mininterval=0.5
        ) as bar:
            for step in steps:
                set_rng_seed((seed + done) % 2**32)
                for done in range(done + 1, step + 1):
                    _train(trainer, optim, done, reference)
                    bar.update()
                # New copies at each state: what a loss has learned belongs to one state.
                made = make_losses(chosen)
                gauges = [Gauge(reference, sampler(make_loss(reference)))]
                gauges += [Gauge(name, sampler(made[name])) for name in others]
                # Other random numbers at each state, so that each tests bias anew.
                at = (seed + step) % 2**32
                burn_in, draws = draw_seeds(at, num_samples, num_burn_in)
                measure(gauges, burn_in, draws, bar, warned)
                if gauges[0].failure is not None:
                    when = f" after {step} training steps (too large a learning rate?)"
                    raise ValueError(
                        f"{reference}, to which all losses are compared, cannot run on this "
                        f"model and guide{when if step else ''}: {one_line(gauges[0].failure)}"
                    ) from gauges[0].failure
                results = [gauge.result(gauges[0], threshold) for gauge in gauges]
                states.append(StateResult(step, results))

    return Comparison(
        title=title or f"{_describe(model)} with guide {_describe(guide)}",
        states=states,
        parameters={name: list(tensor.shape) for name, tensor in parameters.items()},
        settings={
            "num_samples": num_samples,
            "num_burn_in": num_burn_in,
            "seed": seed,
            "failure_rate": failure_rate,
            "bias_threshold": threshold,
            "optim": f"{_describe(optim.pt_optim_constructor)}({optim.pt_optim_args})",
            "device": str(next(iter(parameters.values())).device),
            "num_threads": torch.get_num_threads(),
            "pyro_rb": pyro_rb.__version__,
            "pyro": pyro.__version__,
            "torch": str(torch.__version__),
        },
        notes=_explanations(states, made, traces[0]) + list(warned.seen),
    )


def _train(trainer: GradientSampler, optim: PyroOptim, step: int, reference: str) -> None:
    try:
        trainer.train(optim)
    except Exception as error:
        raise ValueError(
            f"training with {reference} failed at step {step}: {one_line(error)}"
        ) from error


def _explanations(
    states: List[StateResult], losses: Dict[str, Any], guide_trace: poutine.Trace
) -> List[str]:
    """Reasons for results that would surprise."""
    biased = {row.name for state in states for row in state.losses if row.biased}
    dropped = [
        repr(name)
        for name, site in guide_trace.nodes.items()
        if site["type"] == "sample"
        and isinstance(site["fn"], dist.Delta)
        and torch.any(site["fn"].log_density != 0)
    ]
    return [
        f"{name} is biased on this guide: Pyro's KL divergence of a Delta leaves out its "
        f"log_density, here the Jacobian of {', '.join(dropped)}."
        for name, loss in losses.items()
        if name in biased and dropped and isinstance(loss, TraceMeanField_ELBO)
    ]


@contextmanager
def _recorded_warnings() -> Iterator[WarningLog]:
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        warned = WarningLog(log)
        yield warned
        warned.collect("model and guide")


def _steps(train_steps: Union[int, Sequence[int]]) -> List[int]:
    listed = [train_steps] if isinstance(train_steps, int) else list(train_steps)
    if not listed or any(not isinstance(n, int) or n < 0 for n in listed):
        raise ValueError(
            f"train_steps: expected an integer >= 0 or a list of such, got {train_steps!r}"
        )
    if isinstance(train_steps, int):
        listed = [0, train_steps // 2, train_steps]
    return sorted(set(listed))


def _describe(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
