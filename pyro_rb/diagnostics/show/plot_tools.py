# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of a check of bias, of a measurement of noise, and of a training run."""

import math
from typing import Any

from pyro_rb.diagnostics.check.unbiased import BiasCheck
from pyro_rb.diagnostics.fit.fit import Fit
from pyro_rb.diagnostics.noise.noise import NoiseEstimate
from pyro_rb.diagnostics.show.palette import INK, STYLES, dress, literal
from pyro_rb.diagnostics.show.plot import require_matplotlib
from pyro_rb.diagnostics.show.words import short_names

BLUE, RED = STYLES[1][0], STYLES[6][0]
MOST_BARS = 30


def draw_check(check: BiasCheck) -> Any:
    """The largest z-score of each parameter, and the threshold; the largest at the top."""
    figure, axes = _panel()
    ranked = sorted(zip(check.z_scores.values(), short_names(list(check.z_scores))))[-MOST_BARS:]
    colors = [RED if z > check.threshold else BLUE for z, _ in ranked]
    axes.barh([literal(name) for _, name in ranked], [z for z, _ in ranked], color=colors, height=0.6)
    axes.axvline(check.threshold, color=INK, ls="--", label=f"threshold {check.threshold:.1f}")
    axes.set_xlim(0, 3 * check.threshold)
    axes.margins(y=0.02)
    dress(axes, "largest |z|", "")
    return _finished(figure, axes)


def draw_noise(noise: NoiseEstimate) -> Any:
    """The relative error of the gradient against the number of draws that are averaged."""
    figure, axes = _panel()
    counts = [10 ** (k / 10) for k in range(0, 51)]
    low, high = (max(noise.signal + sign * 2 * noise.signal_error, 0.0) for sign in (1, -1))

    def errors(signal: float) -> list:
        scale = math.sqrt(noise.variance / signal) if signal > 0 else math.inf
        return [min(scale / math.sqrt(count), 1e6) for count in counts]

    if noise.signal > 0:
        axes.plot(counts, errors(noise.signal), color=BLUE, label="relative error of the mean gradient")
    band = "two standard errors of its length"
    axes.fill_between(counts, errors(low), errors(high), color=BLUE, alpha=0.25, linewidth=0, label=band)
    axes.axhline(1.0, color=INK, ls="--", label="as much noise as signal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    first = errors(noise.signal)[0] if noise.signal > 0 else 1e2
    axes.set_ylim(1e-3, max(3.0, 3 * first))
    dress(axes, "draws (particles, or steps at a standstill)", "relative error")
    return _finished(figure, axes)


def draw_fit(found: Fit) -> Any:
    """The loss along training, its mean over a fiftieth of the run, and the steps that were bad."""
    figure, axes = _panel()
    steps = range(1, len(found.losses) + 1)
    finite = [(n, loss) for n, loss in zip(steps, found.losses) if math.isfinite(loss)]
    if finite:
        axes.plot(*zip(*finite), color=INK, alpha=0.5, lw=0.6, label="loss of a step")
        size = max(1, len(finite) // 50)
        parts = [finite[i : i + size] for i in range(0, len(finite) - size + 1, size)]
        means = [[sum(column) / size for column in zip(*part)] for part in parts]
        axes.plot(*zip(*means), color=BLUE, label=f"mean of {size} steps")
        # What a few first steps lose would press the rest flat.
        values = sorted(loss for _, loss in finite[len(finite) // 10 :])
        bottom, top = values[len(values) // 200], values[-1 - len(values) // 200]
        margin = 0.1 * (top - bottom) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
    for index, step in enumerate(found.bad_steps):
        axes.axvline(step, color=RED, lw=0.8, label=None if index else "not finite")
    dress(axes, "training steps", "loss (negative ELBO)")
    return _finished(figure, axes)


def _panel() -> Any:
    require_matplotlib()
    from pyro_rb.diagnostics.show.figure import NotebookFigure

    figure = NotebookFigure(figsize=(6.4, 4.2), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure, figure.subplots()


def _finished(figure: Any, axes: Any) -> Any:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure
