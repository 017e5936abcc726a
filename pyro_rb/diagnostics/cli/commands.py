# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What each command does: compare, check, noise and fit."""

import argparse
import dataclasses
import json
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim

from pyro_rb.diagnostics.check.unbiased import check_unbiased
from pyro_rb.diagnostics.cli.examples import EXAMPLES
from pyro_rb.diagnostics.cli.load import load_call, load_guide, load_model, to_device
from pyro_rb.diagnostics.cli.options import check_options
from pyro_rb.diagnostics.compare.compare import compare
from pyro_rb.diagnostics.compare.report import (
    Comparison,
    ComparisonInterrupted,
    finite,
)
from pyro_rb.diagnostics.fit.fit import fit
from pyro_rb.diagnostics.noise.noise import measure_noise
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.show import plot_tools
from pyro_rb.diagnostics.show.page import page, simple_page
from pyro_rb.diagnostics.show.plot import plot_comparisons
from pyro_rb.diagnostics.show.table import LEGEND
from pyro_rb.diagnostics.stats.bias import CheckError

Job = Dict[str, Any]


class Outcome(NamedTuple):
    """
    What is written to files.

    :param dict content: For JSON.
    :param callable page: Makes the HTML page.
    :param callable draw: Makes the figure.
    :param int status: Of the process: 1 if a check failed, 130 if interrupted.
    """

    content: Dict[str, Any]
    page: Callable[[], str]
    draw: Callable[[], Any]
    status: int = 0


def run_command(options: argparse.Namespace) -> int:
    """
    Does what the parsed options say, prints and writes the result. Input is checked before
    anything slow begins.

    :returns: The exit status.
    :rtype: int
    """
    check_options(options)
    if options.command == "compare":
        return _compare(options)
    make_loss(options.loss)
    pyro.set_rng_seed(options.seed)
    job = {**_loaded(options), "progress": not options.no_progress}
    outcome = {"check": _check, "noise": _noise, "fit": _fit}[options.command](options, job)
    _write(options, outcome)
    return outcome.status


def _loaded(options: argparse.Namespace) -> Job:
    model = load_model(options.model)
    guide = load_guide(options.guide, model)
    args, kwargs = load_call(options, model)
    for part in (model, guide):
        to_device(getattr(part, "__self__", part), options.device)
    return {"model": model, "guide": guide, "args": args, "kwargs": kwargs}


def _write(options: argparse.Namespace, outcome: Outcome) -> None:
    try:
        if options.json is not None:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(finite(outcome.content), file, indent=2, allow_nan=False)
                file.write("\n")
        if options.html is not None:
            with open(options.html, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
                file.write(outcome.page())
        if options.plot is not None:
            outcome.draw().savefig(options.plot, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write: {error}") from error


def _compare(options: argparse.Namespace) -> int:
    """Comparisons are shown one by one, and written together, as far as they have come."""
    found: List[Comparison] = []
    failure: Optional[BaseException] = None
    try:
        for job in _jobs(options):
            found.append(
                compare(
                    losses=options.losses,
                    reference=options.reference,
                    num_samples=options.num_samples,
                    num_burn_in=options.burn_in,
                    seed=options.seed,
                    rel_error=options.rel_error,
                    max_seconds=options.max_seconds,
                    train=options.train,
                    steps=options.steps,
                    progress=not options.no_progress,
                    **job,
                )
            )
            _show(found[-1])
    except KeyboardInterrupt as interrupt:
        failure = interrupt
        partial = interrupt.partial if isinstance(interrupt, ComparisonInterrupted) else None
        if partial is not None:
            found.append(partial)
            _show(partial)
    except Exception as error:
        failure = error
    if found:
        if failure is None:
            print(LEGEND)
        content = {"comparisons": [comparison.to_dict() for comparison in found]}
        draw = lambda: plot_comparisons(found, kind=options.plot_kind)  # noqa: E731
        _write(options, Outcome(content, lambda: page(found), draw))
    if failure is not None:
        raise failure
    errors = [comparison.error for comparison in found if comparison.error]
    if errors:
        raise ValueError(errors[0])
    return 0


def _show(comparison: Comparison) -> None:
    print(comparison.table(), end="\n\n", flush=True)


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The arguments of each :func:`compare`, apart from those that are common to all."""
    steps = options.train_steps
    given = {} if steps is None else {"train_steps": steps[0] if len(steps) == 1 else steps}
    if options.model is not None:
        yield {
            **_loaded(options),
            **given,
            "optim": _adam(options.learning_rate or 0.01),
            "title": f"Model {options.model}, guide {options.guide or 'AutoNormal'}",
        }
        return
    for example in EXAMPLES.values():
        yield {
            "model": example.model,
            "guide": AutoNormal(example.model),
            "args": example.make_args(),
            "optim": _adam(options.learning_rate or example.learning_rate),
            "title": example.title,
            "train_steps": (0, example.train_steps),
            **given,
        }


def _adam(learning_rate: float) -> PyroOptim:
    return PyroOptim(torch.optim.Adam, {"lr": learning_rate})


def _outcome(
    options: argparse.Namespace, text: str, content: Dict[str, Any], draw: Callable, status: int = 0
) -> Outcome:
    """Prints the text, which is the page, too."""
    print(text)
    title = f"Model {options.model}, guide {options.guide or 'AutoNormal'}, {options.loss}"
    return Outcome({"title": title, **content}, lambda: simple_page(title, text, draw, bool(status)), draw, status)


def _check(options: argparse.Namespace, job: Job) -> Outcome:
    if options.reference is not None:
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
    status = int(failure is not None)
    return _outcome(options, failure or str(check), content, lambda: plot_tools.draw_check(check), status)


def _noise(options: argparse.Namespace, job: Job) -> Outcome:
    noise = measure_noise(
        options.loss, num_samples=options.num_samples, num_burn_in=options.burn_in, seed=options.seed, **job
    )
    needed = {str(wanted): noise.required_particles(wanted) for wanted in options.rel_error}
    content = {**dataclasses.asdict(noise), "noise_scale": noise.noise_scale, "required_particles": needed}
    lines = [str(noise)]
    lines += [f"num_particles for a relative error of {wanted}: {count:.0f}" for wanted, count in needed.items()]
    return _outcome(options, "\n".join(lines), content, lambda: plot_tools.draw_noise(noise))


def _fit(options: argparse.Namespace, job: Job) -> Outcome:
    found = fit(
        options.loss,
        optim=_adam(options.learning_rate),
        max_steps=options.max_steps,
        tolerance=options.tolerance,
        on_bad=options.on_bad,
        **job,
    )
    if options.save is not None:
        pyro.get_param_store().save(options.save)
    status = 130 if found.stopped == "interrupted" else 0
    return _outcome(options, str(found), found.to_dict(), lambda: plot_tools.draw_fit(found), status)
