# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Compares losses on a model and guide: ``python -m pyro_rb``."""

import argparse
import json
import os
import sys
import traceback
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim

from pyro_rb.diagnostics.cli.commands import parse, run_command
from pyro_rb.diagnostics.cli.examples import EXAMPLES
from pyro_rb.diagnostics.cli.load import load_call, load_guide, load_model, to_device
from pyro_rb.diagnostics.cli.options import (
    COMMANDS,
    PROGRAM,
    check_options,
    make_parser,
)
from pyro_rb.diagnostics.compare.compare import ComparisonInterrupted, compare
from pyro_rb.diagnostics.compare.report import Comparison
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.show.page import page
from pyro_rb.diagnostics.show.plot import plot_comparisons
from pyro_rb.diagnostics.show.table import LEGEND


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Runs the command line.

    :param list argv: Arguments. Default: ``sys.argv[1:]``.
    :returns: The exit status: 0, or 1 if ``check`` finds a bias, or 2 after an error, or 130
        after Ctrl-C, in which case what was measured until then is printed and written.
    :rtype: int
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        options = parse(argv[0], argv[1:])
    else:
        options = make_parser().parse_args(argv)
        options.command = None
    try:
        with _current_directory_first():
            if options.command is not None:
                with _device(options.device):
                    status = run_command(options)
                return _fail("interrupted", status) if status == 130 else status
            run(options)
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        # Errors of our own say what is wrong; their type would add nothing.
        ours = type(error) in (ValueError, ImportError) and _raised_here(error)
        text = " ".join(str(error).split()) if ours else one_line(error)
        return _fail(text + ("" if ours else " (--traceback shows where)"), 2)
    return 0


def run(options: argparse.Namespace) -> None:
    """Does what the parsed options say. Input is checked before anything slow begins."""
    check_options(options)
    comparisons: List[Comparison] = []
    try:
        with _device(options.device):
            for job in _jobs(options):
                comparisons.append(_compare(options, job))
                _show(comparisons[-1])
    except KeyboardInterrupt as interrupt:
        partial = interrupt.partial if isinstance(interrupt, ComparisonInterrupted) else None
        if partial is not None:
            comparisons.append(partial)
            _show(partial)
        if comparisons:
            _write(options, comparisons)
        raise
    print(LEGEND)
    _write(options, comparisons)


def _compare(options: argparse.Namespace, job: Dict[str, Any]) -> Comparison:
    return compare(
        losses=options.losses,
        reference=options.reference,
        num_samples=options.num_samples,
        num_burn_in=options.burn_in,
        seed=options.seed,
        rel_error=options.rel_error,
        max_seconds=options.max_seconds,
        progress=not options.no_progress,
        **job,
    )


def _show(comparison: Comparison) -> None:
    print(comparison.table(), end="\n\n", flush=True)


def _jobs(options: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """The arguments of each :func:`compare`, apart from those that are common to all."""
    steps = options.train_steps
    if steps is not None and len(steps) == 1:
        steps = steps[0]
    if options.model is not None:
        model = load_model(options.model)
        guide = load_guide(options.guide, model)
        args, kwargs = load_call(options)
        for part in (model, guide):
            to_device(getattr(part, "__self__", part), options.device)
        title = f"Model {options.model}, guide {options.guide or 'AutoNormal'}"
        yield {
            "model": model,
            "guide": guide,
            "args": args,
            "kwargs": kwargs,
            "train_steps": 0 if steps is None else steps,
            "optim": _adam(options.learning_rate or 0.01),
            "title": title,
        }
        return
    for example in EXAMPLES.values():
        yield {
            "model": example.model,
            "guide": AutoNormal(example.model),
            "args": example.make_args(),
            "train_steps": (0, example.train_steps) if steps is None else steps,
            "optim": _adam(options.learning_rate or example.learning_rate),
            "title": example.title,
        }


def _adam(learning_rate: float) -> PyroOptim:
    return PyroOptim(torch.optim.Adam, {"lr": learning_rate})


@contextmanager
def _device(name: str) -> Iterator[None]:
    """Makes new tensors on a device. The CPU gets no context, as that would cost time."""
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu":
        yield
        return
    with device:
        yield


@contextmanager
def _current_directory_first() -> Iterator[None]:
    path = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = path


def _write(options: argparse.Namespace, comparisons: List[Comparison]) -> None:
    try:
        if options.json is not None:
            content = {"comparisons": [comparison.to_dict() for comparison in comparisons]}
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, allow_nan=False)
                file.write("\n")
        if options.html is not None:
            with open(options.html, "w", encoding="utf-8") as file:
                file.write(page(comparisons))
        if options.plot is not None:
            plot_comparisons(comparisons, options.plot, options.plot_kind)
    except OSError as error:
        raise ValueError(f"cannot write: {error}") from error


def _raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package, and not by the user's model."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    package = os.path.dirname(os.path.abspath(__file__))
    return where is not None and where.tb_frame.f_code.co_filename.startswith(package)


def _fail(text: str, status: int) -> int:
    print(f"{PROGRAM}: {'' if status == 130 else 'error: '}{text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
