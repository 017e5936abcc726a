# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which guide is good enough? :func:`compare_guides` trains each for equal time."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Callable, List, Mapping, Optional

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim

from pyro_rb.diagnostics.compare.race import (
    LEARNING_RATES,
    Training,
    choose_learning_rate,
)
from pyro_rb.diagnostics.run.arguments import Arguments
from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.run.problem import Problem, prepared
from pyro_rb.infer.rvrs_guide import RVRSGuide
from pyro_rb.infer.stl_elbo import STLTrace_ELBO

#: Above, the guide is too far from the posterior for its draws to be weighted.
LARGE_KHAT = 0.7
#: By which a guide is judged.
NUM_DRAWS = 1000


@dataclass
class GuideResult:
    """
    One guide after training.

    :param str name: The guide.
    :param int num_values: Number of values in its parameters and the model's.
    :param float learning_rate: The best of those that were tried; the guide was trained with it.
    :param int steps: Number of training steps.
    :param float elbo: The ELBO in nats.
    :param float elbo_error: Its standard error over draws of the guide.
    :param float khat: Shape of the tail of the importance weights, see [1]. None if the draws have no
        weights: those of :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide`, of minibatches or subsamples, or by another loss
        than ``Trace_ELBO`` or ``STLTrace_ELBO``.
    :param str error: Why there are no numbers, if so.

    [1] `Yes, but did it work? Evaluating variational inference <https://arxiv.org/abs/1802.02538>`_,
    Y. Yao, A. Vehtari, D. Simpson, A. Gelman, 2018.
    """

    name: str
    num_values: int = 0
    learning_rate: float = math.nan
    steps: int = 0
    elbo: float = math.nan
    elbo_error: float = math.nan
    khat: Optional[float] = None
    error: Optional[str] = None


@dataclass
class GuideComparison:
    """
    What :func:`compare_guides` has found. Prints as a sentence.

    :param float seconds: Training time of each guide.
    :param list guides: A :class:`GuideResult` for each.
    """

    seconds: float
    guides: List[GuideResult] = field(default_factory=list)

    def __str__(self) -> str:
        begin = f"Trained each guide for {self.seconds:.3g} s: "
        sound = sorted((g for g in self.guides if math.isfinite(g.elbo)), key=lambda g: -g.elbo)
        failed = "".join(f" {guide.name} failed: {guide.error.rstrip('.')}." for guide in self.guides if guide.error)
        if not sound:
            return begin + "none has a finite ELBO." + failed
        best = sound[0]
        text = f"{best.name} has the highest ELBO"
        if len(sound) > 1:
            error = math.hypot(best.elbo_error, sound[1].elbo_error)
            text += f", by {best.elbo - sound[1].elbo:.3g} +/- {error:.2g} nats"
        good = [guide.name for guide in sound if guide.khat is not None and guide.khat <= LARGE_KHAT]
        text += f". Close to the posterior (k-hat of {LARGE_KHAT} or less): {', '.join(good) or 'none'}."
        return begin + text + failed


def compare_guides(
    model: Callable,
    guides: Mapping[str, Callable],
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    loss: str = "Trace_ELBO",
    seconds: float = 5.0,
    optim: Optional[PyroOptim] = None,
    seed: int = 0,
    progress: bool = True,
) -> GuideComparison:
    """
    Trains each guide from its present state, for equal time. Gives its ELBO, and by k-hat how far it is
    from the posterior. First each of four learning rates is tried for a quarter of the time, and the best
    is taken. Everything is left as it was found.

    :param dict guides: Guides by name. They may be :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide`.
    :param args: As in :func:`~pyro_rb.diagnostics.compare.compare.compare`, and so are ``kwargs``,
        ``optim``, ``seed`` and ``progress``.
    :param str loss: Name of the loss to train with, with the ELBO as its objective.
    :param float seconds: Training time of each guide: CPU time if torch has one thread.
    :raises ImportError: If arviz is missing: ``pip install "pyro_rb[arviz]"``.
    :raises ValueError: If ``guides`` is empty or ``seconds`` is not positive.

    A guide that cannot be trained gets a row that says why. The ELBO is that of the last step, not the
    best that the guide can reach: give so many ``seconds`` that more would change nothing.

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> guides = {"wide": AutoNormal(model), "narrow": AutoNormal(model, init_scale=0.01)}
    >>> result = compare_guides(model, guides, seconds=0.01, progress=False)
    >>> [(row.name, row.num_values, row.error) for row in result.guides]
    [('wide', 2, None), ('narrow', 2, None)]
    """
    smoothed_khat = import_khat()
    if not isinstance(guides, Mapping) or not guides:
        raise ValueError(f"guides: expected a dict of guides by name, got {guides!r}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number > 0, got {seconds!r}")
    optim = PyroOptim(torch.optim.Adam, {"lr": 0.01}) if optim is None else optim
    result = GuideComparison(float(seconds))
    counts = {"training": len(guides) * (len(LEARNING_RATES) + 1)}
    with TimedBar(progress, "guides", counts, {}) as bar:
        for name, guide in guides.items():
            row = GuideResult(name)
            result.guides.append(row)
            try:
                with prepared(model, guide, args, kwargs, seed) as problem:
                    if problem.sites.is_point and not isinstance(guide, RVRSGuide):
                        raise ValueError("a point estimate has no ELBO that could be compared")
                    log_weights = _train(problem, row, loss, optim, seconds, bar)
            except Exception as error:
                row.error = one_line(error)
                continue
            row.elbo = log_weights.mean().item()
            row.elbo_error = (log_weights.std() / len(log_weights) ** 0.5).item()
            if _has_log_weights(problem, loss) and log_weights.isfinite().all():
                row.khat = smoothed_khat(log_weights.numpy())
    return result


def _has_log_weights(problem: Problem, loss: str) -> bool:
    """Whether values of the loss are log weights of draws of the guide, and nothing else."""
    is_noisy = callable(problem.args) or problem.sites.has_subsample or isinstance(problem.guide, RVRSGuide)
    return type(make_loss(loss)) in (Trace_ELBO, STLTrace_ELBO) and not is_noisy


def _train(
    problem: Problem, row: GuideResult, loss: str, optim: PyroOptim, seconds: float, bar: TimedBar
) -> torch.Tensor:
    """Fills the row. Returns log weights of the guide's draws."""
    judge_loss: Any = make_loss(loss)
    judge_loss.num_particles = 1
    judge = problem.sampler(judge_loss)
    row.num_values = sum(tensor.numel() for tensor in problem.parameters.values())
    made = make_loss(loss)
    begin = Training(problem, made, optim, 1.0, 0)
    row.learning_rate, _ = choose_learning_rate(begin, made, optim, seconds / 4, judge, bar, LEARNING_RATES)
    training = Training(problem, made, optim, row.learning_rate, 0)
    training.train(seconds)
    row.steps, row.error = training.num_steps, training.error
    bar.update("training")
    return torch.tensor(training.draw(judge, NUM_DRAWS), dtype=torch.double, device="cpu").neg()


def import_khat() -> Callable[[np.ndarray], float]:
    """
    :returns: What computes the shape of the tail from log weights.
    :raises ImportError: If arviz is missing.

    **Example**

    >>> import_khat()(np.linspace(-1.0, 1.0, 200)) < LARGE_KHAT
    True
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # arviz announces its next version
            import arviz
    except ImportError as error:
        raise ImportError(
            'To compare guides, arviz is needed for k-hat: pip install "pyro_rb[arviz]"'
        ) from error
    return lambda log_weights: float(arviz.psislw(log_weights)[1])
