# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
``python -m pyro_rb check``, ``noise`` and ``fit``: :func:`check_unbiased`,
:func:`measure_noise`, and training with :class:`GradientGuard` and :class:`StopRule`.
"""

import argparse
import dataclasses
import io
import json
from html import escape
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import pyro
import torch
from pyro.optim import PyroOptim

from pyro_rb.diagnostics.check.unbiased import METHODS, check_unbiased
from pyro_rb.diagnostics.cli.load import load_call, load_guide, load_model, to_device
from pyro_rb.diagnostics.cli.options import (
    COMMANDS,
    PROGRAM,
    add_model_options,
    add_output_options,
    check_output_options,
)
from pyro_rb.diagnostics.compare.report import finite
from pyro_rb.diagnostics.fit.fit import fit
from pyro_rb.diagnostics.guard.guard import ON_BAD
from pyro_rb.diagnostics.noise.noise import measure_noise
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.show import plot_tools
from pyro_rb.diagnostics.show.page import PAGE, STYLE
from pyro_rb.diagnostics.stats.bias import CheckError

Job = Dict[str, Any]


class Outcome(NamedTuple):
    """
    :param str text: What to print.
    :param dict content: For JSON.
    :param callable draw: Makes the figure.
    :param int status: Of the process: 1 if a check failed, 130 if interrupted.
    """

    text: str
    content: Dict[str, Any]
    draw: Callable[[], Any]
    status: int = 0


def parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    """
    The options of one command.

    :param str command: One of :data:`~pyro_rb.diagnostics.cli.options.COMMANDS`.
    """
    what, add_options, _ = _COMMANDS[command]
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {command}", description=what)
    add_model_options(parser, is_required=True)
    parser.add_argument("--loss", metavar="LOSS", default="Trace_ELBO", help="the loss (Trace_ELBO)")
    add_options(parser.add_argument)
    add_output_options(parser)
    options = parser.parse_args(argv)
    options.command = command
    return options


def run_command(options: argparse.Namespace) -> int:
    """
    Does what the parsed options say, prints and writes the result.

    :returns: The exit status.
    :rtype: int
    """
    check_output_options(options)
    make_loss(options.loss)
    pyro.set_rng_seed(options.seed)
    model = load_model(options.model)
    guide = load_guide(options.guide, model)
    args, kwargs = load_call(options)
    for part in (model, guide):
        to_device(getattr(part, "__self__", part), options.device)
    job = {
        "model": model,
        "guide": guide,
        "args": args,
        "kwargs": kwargs,
        "progress": not options.no_progress,
    }
    outcome = _COMMANDS[options.command][2](options, job)
    print(outcome.text)
    title = f"Model {options.model}, guide {options.guide or 'AutoNormal'}, {options.loss}"
    try:
        if options.json is not None:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"title": title, **finite(outcome.content)}, file, indent=2, allow_nan=False)
                file.write("\n")
        if options.html is not None:
            with open(options.html, "w", encoding="utf-8") as file:
                file.write(_page(title, outcome))
        if options.plot is not None:
            outcome.draw().savefig(options.plot, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write: {error}") from error
    return outcome.status


def _page(title: str, outcome: Outcome) -> str:
    kind = "advice thin" if outcome.status else "advice"
    text = escape(outcome.text).replace("\n", "<br>")
    body = f'<div class="pyro-rb"><h2>{escape(title)}</h2>\n<p class="{kind}">{text}</p>'
    try:
        buffer = io.StringIO()
        outcome.draw().savefig(buffer, format="svg")
        svg = buffer.getvalue()
        body += f"<div>{svg[svg.index('<svg') :]}</div>"
    except ImportError:  # without matplotlib there is no figure
        pass
    return PAGE.format(title=escape(title), style=STYLE, body=f"{body}</div>")


def _check_options(add: Callable) -> None:
    add("--reference", metavar="LOSS", default="Trace_ELBO", help="what to compare it to (Trace_ELBO)")
    add("--method", choices=METHODS, help="how to compare (paired); exact: the reference has no noise")
    add("--num-samples", metavar="N", type=int, default=1000, help="gradients of each loss (1000)")
    add("--burn-in", metavar="N", type=int, default=0, help="gradients drawn before (0)")
    add("--failure-rate", metavar="RATE", type=float, default=1e-4, help="of an unbiased loss (0.0001)")
    add("--detect", metavar="SHARE", type=float, help="fail if a bias of this share could not be seen")


def _check(options: argparse.Namespace, job: Job) -> Outcome:
    make_loss(options.reference)
    failure: Optional[str] = None
    try:
        check = check_unbiased(
            options.loss,
            reference=options.reference,
            method=options.method,
            num_samples=options.num_samples,
            num_burn_in=options.burn_in,
            failure_rate=options.failure_rate,
            detect=options.detect,
            seed=options.seed,
            **job,
        )
    except CheckError as error:
        check, failure = error.check, str(error)
    content = {**dataclasses.asdict(check), "failure": failure}
    return Outcome(failure or str(check), content, lambda: plot_tools.draw_check(check), int(failure is not None))


def _noise_options(add: Callable) -> None:
    add("--num-samples", metavar="N", type=int, default=400, help="number of draws (400)")
    add("--burn-in", metavar="N", type=int, default=0, help="draws made before (0)")
    add("--rel-error", metavar="SHARE", type=float, nargs="+", default=[0.1], help="wanted of the gradient (0.1)")


def _noise(options: argparse.Namespace, job: Job) -> Outcome:
    noise = measure_noise(
        options.loss, num_samples=options.num_samples, num_burn_in=options.burn_in, seed=options.seed, **job
    )
    needed = {str(wanted): noise.required_particles(wanted) for wanted in options.rel_error}
    content = {**dataclasses.asdict(noise), "noise_scale": noise.noise_scale, "required_particles": needed}
    lines = [str(noise)]
    lines += [f"num_particles for a relative error of {wanted}: {count:.0f}" for wanted, count in needed.items()]
    return Outcome("\n".join(lines), content, lambda: plot_tools.draw_noise(noise))


def _fit_options(add: Callable) -> None:
    add("--max-steps", metavar="N", type=int, default=10000, help="steps at most (10000)")
    add("--learning-rate", metavar="RATE", type=float, default=0.01, help="of Adam (0.01)")
    add("--tolerance", metavar="NATS", type=float, help="the gain not worth waiting for (a tenth of the noise)")
    add("--on-bad", choices=ON_BAD, default="raise", help="what to do when a gradient is not finite (raise)")
    add("--save", metavar="FILE", help="save the param store")


def _fit(options: argparse.Namespace, job: Job) -> Outcome:
    if options.max_steps < 1:
        raise ValueError(f"--max-steps: expected at least 1, got {options.max_steps}")
    optim = PyroOptim(torch.optim.Adam, {"lr": options.learning_rate})
    found = fit(
        options.loss,
        optim=optim,
        max_steps=options.max_steps,
        tolerance=options.tolerance,
        on_bad=options.on_bad,
        **job,
    )
    if options.save is not None:
        pyro.get_param_store().save(options.save)
    status = 130 if found.stopped == "interrupted" else 0
    return Outcome(str(found), found.to_dict(), lambda: plot_tools.draw_fit(found), status)


_COMMANDS: Dict[str, Tuple[str, Callable, Callable]] = dict(
    zip(
        COMMANDS,
        (
            ("Is the gradient of a loss unbiased? Ends with status 1 if not.", _check_options, _check),
            ("How many particles does a wanted precision of the gradient take?", _noise_options, _noise),
            ("Trains until the loss falls no more, guarded against NaN.", _fit_options, _fit),
        ),
    )
)
