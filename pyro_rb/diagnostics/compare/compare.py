# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which loss gives the best gradients for the time it takes? :func:`compare` measures it."""

import copy
from typing import Any, Callable, List, Mapping, Optional, Sequence, Union

import pyro
import torch
from pyro.optim import PyroOptim

import pyro_rb
from pyro_rb.diagnostics.compare.along_training import MOST_STEPS, Study
from pyro_rb.diagnostics.compare.candidates import candidates
from pyro_rb.diagnostics.compare.chooser import Choice, Chooser
from pyro_rb.diagnostics.compare.compiled import (
    MOST_COMPILED,
    USUAL_STEPS,
    CompiledTime,
    time_best,
)
from pyro_rb.diagnostics.compare.guides import (
    GuideComparison,
    compare_guides,
    import_khat,
)
from pyro_rb.diagnostics.compare.measure import list_steps, make_plan
from pyro_rb.diagnostics.compare.race import (
    LEARNING_RATES,
    NUM_POINTS,
    NUM_SEEDS,
    Race,
    race,
    trained_tensors,
)
from pyro_rb.diagnostics.compare.recommend import LEAST_SAMPLES, recommend
from pyro_rb.diagnostics.compare.report import Comparison, ComparisonInterrupted
from pyro_rb.diagnostics.run.arguments import Arguments, integer
from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.losses import (
    Losses,
    has_elbo,
    is_made_by,
    make_loss,
    make_losses,
)
from pyro_rb.diagnostics.run.messages import one_line, recorded_warnings
from pyro_rb.diagnostics.run.problem import prepared
from pyro_rb.diagnostics.stats.mean_test import z_threshold

#: So many losses are trained, beside the reference.
MOST_RACERS = 4


def compare(
    model: Callable,
    guide: Callable,
    losses: Optional[Losses] = None,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 300,
    num_burn_in: int = 100,
    train_steps: Union[None, int, Sequence[int]] = None,
    optim: Optional[PyroOptim] = None,
    seed: int = 0,
    failure_rate: float = 1e-3,
    title: Optional[str] = None,
    progress: bool = True,
    reference: Optional[str] = None,
    rel_error: Optional[float] = None,
    max_seconds: Optional[float] = None,
    train: Union[bool, float] = False,
    guides: Optional[Mapping[str, Callable]] = None,
    steps: Optional[int] = None,
) -> Comparison:
    """
    Compares losses on a model and guide: is the gradient unbiased, how large is its
    variance, what does it cost? And which loss is to be recommended?

    All losses are measured in turn, at the same parameters and, draw by draw, with the same random
    numbers. They are compared with a reference, which is always measured:
    :class:`~pyro.infer.trace_elbo.Trace_ELBO` unless you say otherwise. ``variance x time`` tells
    how long a loss takes to estimate the gradient with a given precision; ``result.recommendation``
    weighs the states of the parameters by the rule in
    :mod:`~pyro_rb.diagnostics.compare.recommend`.

    Bias is tested against the exact gradient where all latent variables are discrete and
    few enough to be enumerated, and otherwise against that of the reference, draw by draw;
    ``result.settings["reference_gradient"]`` says which.

    The param store, the random number generators and the modules are left as they were
    found, see :func:`~pyro_rb.diagnostics.run.state.preserve_state`. A loss that cannot run on
    this model and guide gets a row that says why. If training or the reference fails after
    something was measured, the result so far is returned, and ``result.error`` says what happened.

    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide whose sample sites match the model's.
    :param losses: Names such as ``"STLTrace_ELBO"`` (see
        :func:`~pyro_rb.diagnostics.run.losses.make_loss`), ELBO instances, or a dict of either by
        name. Instances are copied. Default: those that apply, see
        :func:`~pyro_rb.diagnostics.compare.candidates.choose_losses`; ``result.left_out`` says why the
        others do not.
    :param args: Positional arguments of model and guide; or a function without arguments that returns
        them. The function is called before each step, for a new minibatch. The noise of the
        minibatches then counts in all variances, and the time of the function counts as well. It must
        draw with the generators of torch, numpy or random, so that all losses see the same batches.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of gradients of each loss at each state, at least 2. With
        ``rel_error``, the least number. Candidates that you have not named are dropped once they need twice the time
        of the best and are five standard errors behind it, but not before a fifth of the gradients, and at least 60,
        are drawn.
    :param int num_burn_in: Number of gradients that are drawn first and thrown away, from
        which adaptive losses learn.
    :param train_steps: With ``n``, the losses are measured before, halfway through (after ``n // 2`` steps) and
        after ``n`` steps of training with the reference. A list of steps says exactly when to measure. 0 measures
        only at the parameters as they are, which gives no advice. Default: before and after a short training run,
        which ends when a :class:`~pyro_rb.diagnostics.stats.stopping.StopRule` says that the loss no longer falls,
        or after 2000 steps or 20 seconds. With fewer than 30 gradients, which give no advice, there is no training
        run.
    :param ~pyro.optim.optim.PyroOptim optim: Optimizer for the training. Default: Adam with
        learning rate 0.01. It is copied.
    :param int seed: Seed, between 0 and 2**32 - 1.
    :param float failure_rate: Probability that any of the losses is called biased by chance.
    :param str title: Heading of the table.
    :param bool progress: Whether to show a progress bar on stderr.
    :param str reference: Name of the loss that the others are compared with. Losses with another objective appear as
        biased, so compare importance-weighted bounds with ``"RenyiELBO:alpha=0,num_particles=8"`` or the like.
        Default: ``Trace_ELBO``, or :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` if the model enumerates a site,
        or the guide has a site of its own, or one with a scale that has a gradient, without a reparameterized draw:
        there ``Trace_ELBO`` is biased.
    :param float rel_error: Go on sampling at each state until the standard error of each
        variance ratio is at most this share of it. Default: take ``num_samples``.
    :param float max_seconds: Stop sampling after this time, with at least two gradients at
        each state; training is not cut short. The states share the time. Results then
        depend on the speed of the machine. Default: no limit, or 600 with ``rel_error``.
    :param train: Whether to train with the best losses and with the reference, for equal time and from the same
        start, to see which ends lowest. A number is the time in seconds for each loss and seed (True: 5). Together
        they take about 20 times that. ``result.race`` has the curves, see
        :func:`~pyro_rb.diagnostics.compare.race.race`.
    :param dict guides: Other guides by name, trained for the same time as this one (that of ``train``, or 5
        seconds), to see whether the guide is good enough. ``result.guides`` has their ELBO and k-hat, see
        :func:`~pyro_rb.diagnostics.compare.guides.compare_guides`.
    :param int steps: How many steps you intend to train for. The recommended loss, and the second best if it is
        close, are also timed under :class:`~pyro_rb.compiled.svi.CompiledSVI`. The time for compilation, 5 to 60
        seconds for each, is spread over this many steps. 0: nothing is compiled. Default: 10000, or 0 if you name
        the losses.
    :returns: A :class:`~pyro_rb.diagnostics.compare.report.Comparison`: it prints as a table, also in notebooks, and
        has ``recommendation``, ``to_dict()``, ``to_html()`` and ``plot()``.
    :raises ValueError: If sites do not match, there is no parameter, a loss is unknown, an
        argument is out of range, or the reference or the training fails before anything is measured.
    :raises ComparisonInterrupted: On Ctrl-C. It is a :class:`KeyboardInterrupt` that holds what was measured until
        then.

    Memory: in addition to that of one training step, about 50 bytes for each parameter value in single precision, and
    8 more for each further loss that learns from its gradients. This was measured with ten million values and three
    losses.

    The test of bias has little power where the gradient is very noisy; the column *bias
    seen from* tells how large a bias would have been noticed. Variances are measured at fixed parameters; they say
    nothing about the path of training.

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0., 1.))
    ...     pyro.sample("x", dist.Normal(z, 1.), obs=x)
    >>> result = compare(model, AutoNormal(model), ["TraceMeanField_ELBO"], args=(torch.tensor(0.7),),
    ...                  train_steps=0, num_samples=20, progress=False)
    >>> [loss.name for loss in result.states[0].losses]
    ['Trace_ELBO', 'TraceMeanField_ELBO']
    """
    num_samples, num_burn_in = integer("num_samples", num_samples), integer("num_burn_in", num_burn_in)
    if train_steps is None and num_samples < LEAST_SAMPLES and rel_error is None:
        train_steps = 0  # too few for advice
    states = None if train_steps is None else list_steps(train_steps)
    num_steps = (USUAL_STEPS if losses is None else 0) if steps is None else integer("steps", steps)
    if num_steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    seed = integer("seed", seed)
    plan = make_plan(num_samples, num_burn_in, rel_error, max_seconds)._replace(
        may_drop=losses is None and rel_error is None
    )
    if optim is None:
        optim = PyroOptim(torch.optim.Adam, {"lr": 0.01})
    if not isinstance(optim, PyroOptim):
        raise TypeError(
            f"optim: expected a pyro.optim.PyroOptim such as pyro.optim.Adam, got {optim!r}"
        )
    z_threshold(failure_rate)  # fails early
    seconds = 5.0 if train is True else float(train)
    if seconds < 0:
        raise ValueError(f"train: expected True, False or a number of seconds > 0, got {train!r}")
    if guides is not None:
        import_khat()  # fails early
    if losses is not None:
        make_losses(losses)
    if reference is not None:
        if not isinstance(reference, str):
            raise TypeError(
                "reference: expected the name of a loss, such as 'Trace_ELBO:num_particles=4', "
                f"got {reference!r}"
            )
        make_loss(reference)
    with recorded_warnings() as warned, prepared(model, guide, args, kwargs, seed) as problem:
        parameters = problem.parameters
        chooser = Chooser(problem)
        choice = Choice(reference or chooser.sites.reference, [], {})
        if losses is None:
            choice = chooser.choose(candidates(), reference)
        num_states, last = (2, MOST_STEPS) if states is None else (len(states), states[-1])
        counts = {"round": (num_samples + num_burn_in) * num_states, "step": last}
        guess = {"step": 1 / (1 + len(choice.losses if losses is None else make_losses(losses)))}
        if num_steps:
            counts["compilation"], guess["compilation"] = MOST_COMPILED, 300.0
        if seconds:
            counts["training"] = (MOST_RACERS + 1) * (len(LEARNING_RATES) + NUM_SEEDS * NUM_POINTS)
        tensors = trained_tensors(problem)
        start = [tensor.detach().clone() for tensor in tensors] if seconds else []
        with TimedBar(progress, title, counts, guess) as bar:
            study = Study(
                problem=problem,
                reference=choice.reference,
                losses=choice.losses if losses is None else losses,
                scored=bool(chooser.sites.scored),
                exact=has_elbo(choice.reference) and chooser.is_exact(),
                steps=states,
                optim=copy.deepcopy(optim),
                plan=plan,
                seed=seed,
                failure_rate=failure_rate,
                bar=bar,
                warned=warned,
            )
            study.run()
            times: List[CompiledTime] = []
            found_race: Optional[Race] = None
            doing = "timing compiled steps"
            try:
                if num_steps and study.is_whole:
                    time_best(problem, study.states, study.made(), optim, times, bar, num_steps)
                doing = "training by all losses"
                if seconds and study.is_whole:
                    with torch.no_grad():
                        for tensor, value in zip(tensors, start):
                            tensor.copy_(value)
                    best = [one.name for one in recommend(study.states).ranking][:MOST_RACERS]
                    bar.start()
                    found_race = race(problem, choice.reference, best, study.made(), optim, seconds, bar)
            except KeyboardInterrupt:
                study.interrupted = True
            except Exception as error:
                study.error = f"{doing} failed: {one_line(error)}"

    if not study.states:
        raise ComparisonInterrupted(None)
    found_guides: Optional[GuideComparison] = None
    if guides and not study.interrupted:
        loss = choice.reference if has_elbo(choice.reference) else "Trace_ELBO"
        name = _describe(guide)
        everyone = {"guide" if name in guides else name: guide, **guides}
        found_guides = compare_guides(model, everyone, args, kwargs, loss, seconds or 5.0, optim, seed, progress)
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
                else f"{choice.reference}, with the same random numbers"
            ),
            "num_samples": num_samples,
            "num_burn_in": num_burn_in,
            "rel_error": rel_error,
            "max_seconds": max_seconds,
            "seed": seed,
            "steps": num_steps,
            "failure_rate": failure_rate,
            "bias_threshold": study.threshold,
            "optim": f"{_describe(optim.pt_optim_constructor)}({optim.pt_optim_args})",
            "device": str(next(iter(parameters.values())).device),
            "num_threads": torch.get_num_threads(),
            "pyro_rb": pyro_rb.__version__,
            "pyro": pyro.__version__,
            "torch": str(torch.__version__),
        },
        notes=study.notes + study.explanations() + warned.notes,
        left_out=choice.left_out,
        training=study.windows(),
        interrupted=study.interrupted,
        error=study.error,
        race=found_race,
        compiled=times,
        guides=found_guides,
        own=[name for name, loss in study.made().items() if not is_made_by(name, loss)],
    )
    if study.interrupted:
        raise ComparisonInterrupted(result)
    return result


def _describe(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
