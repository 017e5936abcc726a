# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

r"""
Which loss to take, in a sentence: :func:`recommend`.

**The rule.** With a gradient of mean :math:`G` and variance :math:`V`, and the best step
size, a gradient method needs a number of steps in proportion to :math:`1 + V / |G|^2` to reduce
what is left to gain by a given factor. So a loss with the time :math:`t` for a step needs

.. math::

    \frac{\sum_s t_s \, (1 + V_s / |G_s|^2)}{\sum_s t_{0s} \, (1 + V_{0s} / |G_s|^2)}

times the time of the reference, which has :math:`t_0` and :math:`V_0`, over the states :math:`s`
along training. Early in training the mean is large. Noise matters little there unless a loss has
very much more of it, and training does not stay there for long. Late in training the mean is close
to zero. These states weigh most, and there the ratio is that of variance times time. How much a
state weighs by its noise is bounded, as if :math:`V_0 / |G|^2` were at most 99.

Each coordinate counts in units of its own gradient, as in the steps of Adam
(:func:`~pyro_rb.diagnostics.stats.progress.steps_ratio`); those that the model does not depend on do
not count (:func:`~pyro_rb.diagnostics.run.effect.find_effect`).

A loss is out of the running if it is biased at any state, or could not be measured at one. It is not
recommended if it needs more than three times the time of the reference before training, as training
begins there. Of the others, the one with the least time is recommended if it saves at least 10%; if
not, the reference is. Where the best are within two standard errors or 5%, the simplest of them is
taken: the one that comes first among the candidates.

There is no advice from the state before training alone, where noise says little about what follows;
nor if a state has fewer than 30 gradients; nor if the best loss and the reference are within two
standard errors, and yet might differ by more than 10%.

**What it predicts** is the time that noise costs near the optimum. From a cold start the gain is as
often another one: in the same time, the loss ends lower.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

from pyro_rb.diagnostics.run.losses import usage
from pyro_rb.diagnostics.run.messages import with_error
from pyro_rb.diagnostics.stats.progress import root_sum_of_squares
from pyro_rb.diagnostics.stats.summary import HEAVY_TAIL

#: Below this many gradients a standard error of a variance means little.
LEAST_SAMPLES = 30
#: What a loss must save to be worth a change, and what may pass for the same.
WORTHWHILE, SAME = 0.1, 0.05
#: A loss that needs so many times the time before training is not one to begin with.
BAD_START = 3.0
#: Steps count by their noise up to this share of it.
MOST_NOISE = 0.99
LOW_POWER = 0.5
MUCH_MEMORY = 1.5


@dataclass
class Ranked:
    """
    A loss in the ranking. Times are those that training takes for the same precision, as multiples of the reference's.

    :param str name: The loss.
    :param float time: The time over all states.
    :param float error: Its standard error.
    :param float difference: ``time`` less that of the best.
    :param float difference_error: Its standard error. Most of the error is common to both, as all losses see the same
        random numbers.
    :param list by_state: The time at each state.
    :param list parts: What each block of draws adds to ``error``, and last what the time of a step adds.
    """

    name: str
    time: float
    error: float
    by_state: List[float]
    difference: float = 0.0
    difference_error: float = 0.0
    parts: List[float] = field(default_factory=list, repr=False)

    def scaled(self, name: str, share: float) -> "Ranked":
        """The same for another name, where all takes this share of the time."""
        times = [share * time for time in self.by_state]
        return Ranked(name, share * self.time, share * self.error, times, parts=[share * x for x in self.parts])


@dataclass
class Recommendation:
    """
    Prints as a sentence.

    :param str loss: The loss to take; None if there is no advice.
    :param str sentence: The advice in a sentence, with the reason.
    :param list caveats: What else the reader should know, each in a sentence.
    :param str usage: The line to write in a script, if the loss is not the reference and is one of Pyro or pyro_rb.
    :param list ranking: A :class:`Ranked` for each loss in the running, the best first.
    """

    loss: Optional[str]
    sentence: str
    caveats: List[str] = field(default_factory=list)
    ranking: List[Ranked] = field(default_factory=list)
    usage: Optional[str] = None

    @property
    def progress_time(self) -> Dict[str, float]:
        """The time of each loss in the running, by name."""
        return {ranked.name: ranked.time for ranked in self.ranking}

    @property
    def progress_time_error(self) -> Dict[str, float]:
        """Its standard error."""
        return {ranked.name: ranked.error for ranked in self.ranking}

    def __str__(self) -> str:
        return " ".join([self.sentence, *self.caveats])


def recommend(states: Sequence[Any], ended: str = "") -> Recommendation:
    """
    Applies the rule above.

    :param list states: A :class:`~pyro_rb.diagnostics.compare.report.StateResult` for each state.
    :param str ended: A sentence on why training ended early, if it did.
    :rtype: Recommendation

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_rb import compare
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.))
    >>> result = compare(model, guide, "STLTrace_ELBO", train_steps=[1], num_samples=40, progress=False)
    >>> recommend(result.states).loss
    'STLTrace_ELBO'
    """
    reference = states[0].losses[0].name
    rows = {row.name: _rows(states, row.name) for row in states[0].losses}
    usable = {name: found for name, found in rows.items() if found is not None}
    ranking = _ranking(states, usable)
    advice = Recommendation(None, "", [], ranking)
    ranked = {one.name: one for one in ranking}
    fewest = min(state.num_samples for state in states)
    if reference not in ranked:
        advice.sentence = (
            f"No advice: {reference} itself disagrees with the exact gradient, so something is wrong "
            "with model, guide or reference."
        )
        return advice
    others = [one for one in ranking if one.name != reference]
    if not others:
        advice.loss = reference
        advice.sentence = f"Stay with {reference}: no other loss that was measured applies."
        return advice
    if fewest < LEAST_SAMPLES:
        advice.sentence = (
            f"No advice: {fewest} gradients of each loss at a state are too few. "
            f"Take at least {10 * LEAST_SAMPLES}."
        )
        return advice
    if len(states) == 1 and not states[0].step:
        advice.sentence = (
            "No advice: the losses were measured at one state only, before training, and noise matters "
            f"more along it. {ended or 'Leave train_steps out, or say how far to train.'}"
        )
        return advice
    starts = [one for one in others if states[0].step or one.by_state[0] <= BAD_START]
    rival = (starts or others)[0]
    gap, error = 1 - rival.time, rival.error
    if not math.isfinite(error) or (abs(gap) < 2 * error and gap + 2 * error > WORTHWHILE):
        advice.sentence = (
            f"No advice yet: {rival.name} needs {with_error(rival.time, error)} times the time of "
            f"{reference}. Take more gradients{_needed(fewest, gap, error)}."
        )
        return advice
    if gap < WORTHWHILE or not starts:
        advice.loss = reference
        advice.sentence = (
            f"Stay with {reference}: for the same precision the best of the others, {rival.name}, "
            f"needs {with_error(rival.time, error)} times its time."
        )
    else:
        best = _simplest([ranked[name] for name in usable if ranked[name] in starts], rival)
        advice.loss, advice.usage = best.name, usage(best.name)
        measured = usable[best.name]
        advice.sentence = (
            f"Take {best.name}: near the optimum it is expected to need {with_error(best.time, best.error)} "
            f"times the time of {reference} for the same precision. Its noise asks for "
            f"{_range(row.steps_ratio for row in measured)} times the steps, and a step takes "
            f"{_range(row.time_ratio for row in measured)} times as long."
        )
    advice.caveats = _caveats(advice.loss, states, usable[advice.loss])
    late = others[0]
    if starts and late not in starts and late.time < (ranked[advice.loss].time) * (1 - WORTHWHILE):
        advice.caveats.append(
            f"{late.name} is better still near the optimum ({_number(late.by_state[-1])}), but not to begin with "
            f"({_number(late.by_state[0])} times the time before training)."
        )
    return advice


def _ranking(states: Sequence[Any], usable: Dict[str, List[Any]]) -> List[Ranked]:
    # The share of each state in the time of the reference.
    costs = [s.losses[0].seconds / (1 - min(s.noise_share, MOST_NOISE)) for s in states]
    weights = [cost / sum(costs) for cost in costs]
    found = []
    for name, rows in usable.items():
        by_state = [row.time_ratio * row.steps_ratio for row in rows]
        parts: List[float] = []
        clock = 0.0
        for row, weight in zip(rows, [0.0 if row.reference else weight for row, weight in zip(rows, weights)]):
            parts += [weight * row.time_ratio * x for x in row.steps_ratio_blocks or [row.steps_ratio_error]]
            clock = math.hypot(clock, weight * row.time_ratio_error * row.steps_ratio)
        time = sum(weight * time for weight, time in zip(weights, by_state))
        error = root_sum_of_squares([*parts, clock])
        found.append(Ranked(name, time, error, by_state, parts=[*parts, clock]))
    return ranked_by_time(found)


def ranked_by_time(found: Sequence[Ranked]) -> List[Ranked]:
    """
    The best first, and how far the others are behind it.

    **Example**

    >>> best, other = ranked_by_time([Ranked("B", 2.0, 0.1, [2.0]), Ranked("A", 1.0, 0.1, [1.0])])
    >>> best.name, other.difference
    ('A', 1.0)
    """
    found = sorted(found, key=lambda one: one.time)
    for one in found[1:]:
        one.difference = one.time - found[0].time
        one.difference_error = _difference_error(one, found[0])
    return found


def _difference_error(a: Ranked, b: Ranked) -> float:
    if len(a.parts) != len(b.parts) or not a.parts:
        return math.hypot(a.error, b.error)
    *blocks, (clock, other) = zip(a.parts, b.parts)
    return root_sum_of_squares([*(x - y for x, y in blocks), clock, other])


def _rows(states: Sequence[Any], name: str) -> Optional[List[Any]]:
    """The loss at all states; None if it is out of the running."""
    found = [row for state in states for row in state.losses if row.name == name]
    usable = len(found) == len(states) and not any(
        row.biased or row.error or row.steps_ratio is None for row in found
    )
    return found if usable else None


def _simplest(candidates: Sequence[Ranked], best: Ranked) -> Ranked:
    """The first that is about as good as the best."""
    for one in candidates:
        about = max(2 * _difference_error(one, best), SAME * best.time)
        if one.time <= min(best.time + about, 1 - WORTHWHILE):
            return one
    return best


def _caveats(loss: str, states: Sequence[Any], measured: List[Any]) -> List[str]:
    found = []
    tested = [row.detectable_bias for row in measured if row.detectable_bias is not None]
    if tested and not min(tested) <= LOW_POWER:
        found.append(f"The draws are too few or too noisy to show a bias of {loss}, had it one.")
    if any((row.tail_share or 0) > HEAVY_TAIL for row in [*measured, *(s.losses[0] for s in states)]):
        found.append("Rare large gradients make up much of the variance, so errors may be larger.")
    memory = [row.memory_ratio for row in measured if row.memory_ratio is not None]
    if memory and max(memory) > MUCH_MEMORY:
        found.append(f"A step of {loss} takes {_number(max(memory))} times the memory.")
    return found


def _needed(num_samples: int, gap: float, error: float) -> str:
    if not math.isfinite(error):
        return ""
    # Then either zero or what is worthwhile is three errors away.
    wanted = max(abs(gap), WORTHWHILE - gap) / 3
    count = num_samples * (error / wanted) ** 2
    return f", about {float(f'{count:.2g}'):.0f} of each"


def _range(values: Any) -> str:
    shown = list(dict.fromkeys(_number(value) for value in sorted(values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"
