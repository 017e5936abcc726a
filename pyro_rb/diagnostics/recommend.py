# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

r"""
Which loss to take, in one sentence: :func:`recommend`.

**The rule.** With a gradient of mean :math:`G` and variance :math:`V`, and the best step
size, a gradient method needs steps in proportion to :math:`1 + V / |G|^2` to reduce what is
left to gain by a given factor. So a loss with the time :math:`t` for a step needs

.. math::

    \frac{\sum_s t_s \, (1 + V_s / |G_s|^2)}{\sum_s t_{0s} \, (1 + V_{0s} / |G_s|^2)}

times the time of the reference, which has :math:`t_0` and :math:`V_0`, for the same progress
at all states :math:`s` along training. Early in training the mean is large, noise matters
little unless a loss has very much more of it, and training does not stay there for long. Late in
training the mean is next to nothing: these states weigh most, and there the ratio is that of
variance times time. How much a state weighs by its noise is bounded, as if
:math:`V_0 / |G|^2` were at most 99.

Each coordinate counts in units of its own gradient, as in the steps of Adam:
:func:`~pyro_rb.diagnostics.progress.steps_ratio` says how. So one parameter with a large
variance does not decide alone, as it does in the total variance of the table.

Out of the running is a loss that is biased at any state, or could not be measured at one.
The one with the least time is recommended if it saves at least 10%, and else the reference.
Where the best are within two standard errors or 5%, the simplest of them is taken: the one
that comes first in the table.

The evidence is too thin if a state has fewer than 30 gradients; or if the best loss and the
reference are within two standard errors, and yet might differ by more than 10%.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from pyro_rb.diagnostics.losses import usage

#: Below this many gradients a standard error of a variance means little.
LEAST_SAMPLES = 30
#: What a loss must save to be worth a change, and what may pass for the same.
WORTHWHILE, SAME = 0.1, 0.05
#: Steps count by their noise up to this share of it.
MOST_NOISE = 0.99
LOW_POWER = 0.5
HEAVY_TAIL = 0.2  # a normal variable has 0.08
MUCH_MEMORY = 1.5


@dataclass
class Recommendation:
    """
    :param str loss: The loss to take; None if the evidence is too thin.
    :param str sentence: The same in a sentence, with the reason.
    :param list caveats: What the reader should know besides, each in a sentence.
    :param str usage: What to write for it in a script, if it is not the reference and is of
        Pyro or pyro_rb.
    :param dict progress_time: Time for the same progress, over that of the reference, by
        loss. Losses that are out of the running are not in it.
    :param dict progress_time_error: Its standard error.
    """

    loss: Optional[str]
    sentence: str
    caveats: List[str] = field(default_factory=list)
    progress_time: Dict[str, float] = field(default_factory=dict)
    progress_time_error: Dict[str, float] = field(default_factory=dict)
    usage: Optional[str] = None


def recommend(states: Sequence[Any]) -> Recommendation:
    """
    Applies the rule above.

    :param list states: A :class:`~pyro_rb.diagnostics.report.StateResult` for each state.
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
    >>> result = compare(model, guide, "STLTrace_ELBO:1.0", num_samples=40, num_burn_in=0, progress=False)
    >>> print(recommend(result.states).sentence[:27])
    Take STLTrace_ELBO:1.0: for
    """
    reference = states[0].losses[0].name
    rows = {row.name: _rows(states, row.name) for row in states[0].losses}
    weights = _weights(states)
    times, errors, each = {}, {}, {}
    for name, measured in rows.items():
        if measured is None:
            continue
        pairs = [progress_time(row) for row in measured]
        each[name] = [time for time, _ in pairs]
        times[name] = sum(weight * time for weight, (time, _) in zip(weights, pairs))
        errors[name] = math.hypot(*(weight * error for weight, (_, error) in zip(weights, pairs)))
    if reference not in times:
        sentence = (
            f"No recommendation: {reference} itself disagrees with the exact gradient, so "
            "something is wrong with model, guide or reference."
        )
        return Recommendation(None, sentence, [], times, errors)

    result = Recommendation(None, "", [], times, errors)
    others = [name for name in times if name != reference]
    fewest = min(state.num_samples for state in states)
    if not others:
        result.loss = reference
        result.sentence = f"Stay with {reference}: no other loss that was measured applies."
        return result
    rival = min(others, key=lambda name: times[name])
    gap, error = 1 - times[rival], errors[rival]
    if fewest < LEAST_SAMPLES:
        result.sentence = (
            f"The evidence is too thin to recommend a loss: {fewest} gradients of each at a "
            f"state. Take at least {10 * LEAST_SAMPLES}."
        )
    elif not math.isfinite(error) or (abs(gap) < 2 * error and gap + 2 * error > WORTHWHILE):
        need = _needed(fewest, gap, error)
        result.sentence = (
            f"The evidence is too thin to recommend a loss: {rival} needs {_number(times[rival])} "
            f"+/- {_number(error)} times the time of {reference} for the same progress. Take "
            f"more gradients{need}."
        )
    elif gap < WORTHWHILE:
        result.loss = reference
        result.sentence = (
            f"Stay with {reference}: for the same progress the best of the others, {rival}, "
            f"needs {_number(times[rival])} +/- {_number(error)} times its time."
        )
    else:
        best = _simplest(times, errors, rival)
        result.loss, result.usage = best, usage(best)
        result.sentence = _sentence(best, reference, states, rows, each, times[best], errors[best])
    if result.loss is not None:
        result.caveats = _caveats(result.loss, states, rows[result.loss] or [])
    return result


def _weights(states: Sequence[Any]) -> List[float]:
    """The share of each state in the time of the reference."""
    steps = [1 / (1 - min(state.noise_share, MOST_NOISE)) for state in states]
    times = [n * state.losses[0].seconds for n, state in zip(steps, states)]
    return [time / sum(times) for time in times]


def progress_time(row: Any) -> Tuple[float, float]:
    """
    Time for the same progress at one state, over that of the reference, and its standard
    error.

    :param LossResult row: The loss.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_rb import compare
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.))
    >>> result = compare(model, guide, "STLTrace_ELBO", num_samples=40, num_burn_in=0, progress=False)
    >>> reference, other = result.states[0].losses
    >>> progress_time(reference)
    (1.0, 0.0)
    >>> time, error = progress_time(other)
    >>> time < 1
    True
    """
    value = row.time_ratio * row.steps_ratio
    if row.reference:
        return value, 0.0
    of_steps = row.time_ratio * row.steps_ratio_error
    return value, math.hypot(of_steps, row.time_ratio_error * row.steps_ratio)


def _rows(states: Sequence[Any], name: str) -> Optional[List[Any]]:
    """The loss at all states; None if it is out of the running."""
    found = [row for state in states for row in state.losses if row.name == name]
    usable = len(found) == len(states) and not any(
        row.biased or row.error or row.steps_ratio is None for row in found
    )
    return found if usable else None


def _simplest(times: Dict[str, float], errors: Dict[str, float], best: str) -> str:
    """The first loss of the table that is about as good as the best."""
    for name, time in times.items():
        about = max(2 * math.hypot(errors[name], errors[best]), SAME * times[best])
        if time <= min(times[best] + about, 1 - WORTHWHILE):
            return name
    return best


def _sentence(
    best: str,
    reference: str,
    states: Sequence[Any],
    rows: Dict[str, Optional[List[Any]]],
    each: Dict[str, List[float]],
    time: float,
    error: float,
) -> str:
    measured = rows[best] or []
    parts = ""
    if len(states) > 1:
        parts = f" ({', '.join(f'{_number(t)} {s.when()}' for t, s in zip(each[best], states))})"
    return (
        f"Take {best}: for the same progress it needs {_number(time)} +/- {_number(error)} "
        f"times the time of {reference}{parts}. By its noise it needs "
        f"{_range(row.steps_ratio for row in measured)} times the steps, and a step takes "
        f"{_range(row.time_ratio for row in measured)} times as long."
    )


def _caveats(loss: str, states: Sequence[Any], measured: List[Any]) -> List[str]:
    found = []
    if len(states) == 1:
        when = states[0].when() if states[0].step else "at the parameters as they are"
        found.append(
            f"This was measured {when} only. Noise matters more late in training: measure "
            "along it by train_steps."
        )
    tested = [row.detectable_bias for row in measured if row.detectable_bias is not None]
    if tested and not min(tested) <= LOW_POWER:
        found.append(f"The draws are too few or too noisy to show a bias of {loss}, had it one.")
    if any((row.tail_share or 0) > HEAVY_TAIL for row in [*measured, *_references(states)]):
        found.append("Rare large gradients make up much of the variance, so errors may be larger.")
    memory = [row.memory_ratio for row in measured if row.memory_ratio is not None]
    if memory and max(memory) > MUCH_MEMORY:
        found.append(f"A step of {loss} takes {_number(max(memory))} times the memory.")
    return found


def _references(states: Sequence[Any]) -> List[Any]:
    return [state.losses[0] for state in states]


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
