# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a comparison has found, as a table, as a dict for JSON and as a figure."""

import dataclasses
import math
import os
import textwrap
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from tabulate import tabulate

LOW_POWER = 0.5
HEAVY_TAIL = 0.2  # a normal variable has 0.08


@dataclass
class LossResult:
    """
    One loss at one state of the parameters. Ratios are to the reference.

    :param str name: The loss.
    :param bool reference: Whether this is the reference.
    :param str error: Why the loss could not be measured; all numbers are then None.
    :param float bias_z: The largest absolute z-score, over coordinates, of the difference
        between the mean gradients of the loss and the reference, paired draw by draw.
    :param str bias_at: The coordinate where it was found.
    :param float bias_size: The difference there, as a share of the root-mean-square norm of
        the reference's gradient.
    :param float bias_threshold: The z-score beyond which the loss is called biased.
    :param bool biased: Whether it is.
    :param float detectable_bias: A bias of this size in any one coordinate would have been
        seen with probability 0.95; a share of the same norm.
    :param float variance: Variance of one gradient, summed over coordinates.
    :param float variance_ratio: The same over that of the reference.
    :param float variance_ratio_error: Its standard error.
    :param dict variance_shares: The share of each parameter in ``variance``.
    :param float tail_share: The share in ``variance`` of the 1% largest gradients. None with
        fewer than 100 draws.
    :param float seconds: Median time of one gradient.
    :param float time_ratio: Median over draws of the time over that of the reference.
    :param float time_ratio_error: Its standard error.
    :param float cost_ratio: ``variance_ratio * time_ratio``: the ratio of the times that
        both need to estimate the gradient equally well.
    :param float loss: Mean value of the loss.
    :param float loss_error: Its standard error.
    """

    name: str
    reference: bool = False
    error: Optional[str] = None
    bias_z: Optional[float] = None
    bias_at: Optional[str] = None
    bias_size: Optional[float] = None
    bias_threshold: Optional[float] = None
    biased: Optional[bool] = None
    detectable_bias: Optional[float] = None
    variance: Optional[float] = None
    variance_ratio: Optional[float] = None
    variance_ratio_error: Optional[float] = None
    variance_shares: Dict[str, float] = field(default_factory=dict)
    tail_share: Optional[float] = None
    seconds: Optional[float] = None
    time_ratio: Optional[float] = None
    time_ratio_error: Optional[float] = None
    cost_ratio: Optional[float] = None
    loss: Optional[float] = None
    loss_error: Optional[float] = None


@dataclass
class StateResult:
    """
    All losses at one state of the parameters.

    :param int step: Number of training steps before the measurement.
    :param list losses: A :class:`LossResult` for each loss, the reference first.
    """

    step: int
    losses: List[LossResult]


@dataclass
class Comparison:
    """
    The result of :func:`~pyro_rb.diagnostics.compare.compare`. Prints as a table.

    :param str title: Heading.
    :param list states: A :class:`StateResult` for each state.
    :param dict parameters: The shape of each parameter, by name.
    :param dict settings: How it was measured.
    :param list notes: Explanations, and warnings that were raised meanwhile, each once.
    """

    title: str
    states: List[StateResult]
    parameters: Dict[str, List[int]]
    settings: Dict[str, Any]
    notes: List[str]

    def to_dict(self) -> Dict[str, Any]:
        """
        All results as dicts, lists, strings and numbers, ready for :func:`json.dumps`.
        Infinite and undefined numbers are None.
        """
        result = _finite(dataclasses.asdict(self))
        assert isinstance(result, dict)
        return result

    def plot(self, path: Optional[str] = None) -> Any:
        """
        Draws variance against time, one panel a state.

        :param str path: Where to save the figure, by the file's extension. Default: nowhere.
        :returns: A :class:`matplotlib.figure.Figure`.
        :raises ImportError: If matplotlib is missing: ``pip install "pyro_rb[plot]"``.
        """
        from pyro_rb.diagnostics.plot import plot_comparisons

        return plot_comparisons([self], path)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{LEGEND}"

    def table(self) -> str:
        """The printed form without the legend, ``LEGEND``."""
        size = sum(math.prod(shape) for shape in self.parameters.values())
        settings = self.settings
        lines = [
            self.title,
            f"{size} parameter values, {settings['num_samples']} gradients of each loss, "
            f"seed {settings['seed']}, device {settings['device']}; biased means |z| > "
            f"{settings['bias_threshold']:.1f}",
        ]
        if self.states[-1].step:
            reference = self.states[0].losses[0].name
            lines.append(f"trained with {reference} and {settings['optim']}")
        for state in self.states:
            when = "At the parameters as they are" if len(self.states) == 1 else "Before training"
            when = f"After {state.step} training steps" if state.step else when
            lines += ["", *_state_lines(state, when)]
        lines += [_wrap(f"Note: {text}") for text in self.notes]
        return "\n".join(lines)


LEGEND = """\
bias z      largest |z| over all coordinates, of the mean gradient against the reference's.
            !  so large that the loss is biased, or has another objective.
detects     smallest bias in one coordinate that the test would have found, in % of the
            size of the reference's gradient; more draws lower it. ?  only a large one.
variance x  total variance of the gradient, time x  time per step: ratio to the reference,
            +/- one standard error.
product     of both: the time for a gradient as exact as the reference's; below 1 is better."""

_HEADERS = ["loss", "bias z", "detects", "variance x", "time x", "product", "variance is due to"]
_ALIGN = ("left", "right", "right", "right", "right", "right", "left")


def _state_lines(state: StateResult, when: str) -> List[str]:
    reference = state.losses[0]
    assert reference.seconds is not None and reference.loss is not None
    lines = [
        f"{when}: loss {reference.loss:.4g} +/- {reference.loss_error:.2g}, "
        f"{1e3 * reference.seconds:.3g} ms a step with {reference.name}",
        "",
        tabulate(
            [_row(result) for result in state.losses],
            _HEADERS,
            tablefmt="simple",
            disable_numparse=True,
            colalign=_ALIGN,
        ),
        "",
    ]
    remarks = []
    for result in state.losses:
        if result.error:
            remarks.append(f"{result.name} could not be measured: {result.error}")
        elif result.biased:
            remarks.append(
                f"{result.name} is biased, or has another objective: its mean gradient differs "
                f"at {result.bias_at} by {_percent(result.bias_size)} of the gradient's size."
            )
    heavy = [
        f"{_percent(result.tail_share)} of that of {result.name}"
        for result in state.losses
        if (result.tail_share or 0) > HEAVY_TAIL
    ]
    if heavy:
        remarks.append(
            "Rare large gradients dominate the variance: the largest 1% make up "
            f"{', '.join(heavy)}. It is less certain than the standard error says; take more draws."
        )
    best = min(
        (r for r in state.losses if r.cost_ratio is not None and not r.biased),
        key=lambda r: r.cost_ratio or 0.0,
    )
    remarks.append(f"Best variance x time: {best.name}, {_number(best.cost_ratio)}.")
    return lines + [_wrap(remark) for remark in remarks]


def _wrap(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False)


def _row(result: LossResult) -> List[str]:
    if result.error:
        return [result.name, *["-"] * 5, "not measured"]
    bias, detects = "reference", ""
    if not result.reference:
        low_power = (result.detectable_bias or 0) > LOW_POWER
        mark = "!" if result.biased else "?" if low_power else " "
        large = (result.bias_z or 0) >= 1000
        bias = f"{'>999' if large else f'{result.bias_z:.1f}'} {mark}"
        detects = _percent(result.detectable_bias)
    return [
        result.name,
        bias,
        detects,
        _with_error(result.variance_ratio, None if result.reference else result.variance_ratio_error),
        _with_error(result.time_ratio, None if result.reference else result.time_ratio_error),
        _number(result.cost_ratio),
        _shares(result.variance_shares),
    ]


def _shares(shares: Dict[str, float], most: int = 2) -> str:
    """The parameters with most of the variance. What all names begin with is left out."""
    # Pyro joins a module's name and its parameter's by $$$.
    names = [name.replace("$$$", ".") for name in shares]
    start = os.path.commonprefix([name[: name.rfind(".") + 1] for name in names])
    start = start[: start.rfind(".") + 1]
    ranked = sorted(zip(shares.values(), names), reverse=True)
    shown = [f"{name[len(start):]} {_percent(share)}" for share, name in ranked[:most] if share > 0.005]
    return ", ".join(shown) or "no variance"


def _with_error(value: Optional[float], error: Optional[float]) -> str:
    if value is None or error is None or not math.isfinite(error):
        return _number(value)
    if abs(value) < 0.1:
        return f"{value:.2g} +/- {error:.1g}"
    digits = 0 if error >= 1 else 1 if error >= 0.1 else 2
    # Rounded up: an error of 0.00 would promise too much.
    return f"{value:.{digits}f} +/- {max(error, 10.0**-digits):.{digits}f}"


def _number(value: Optional[float]) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _percent(share: Optional[float]) -> str:
    if share is None or not math.isfinite(share):
        return "-"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
