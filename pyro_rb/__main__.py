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

from pyro_rb import __version__
from pyro_rb.diagnostics.compare import compare
from pyro_rb.diagnostics.load import load_args, load_guide, load_model, to_device
from pyro_rb.diagnostics.losses import DEFAULT_LOSSES, REFERENCE, make_losses
from pyro_rb.diagnostics.measure import one_line
from pyro_rb.diagnostics.models import EXAMPLES
from pyro_rb.diagnostics.plot import check_plot_path, plot_comparisons
from pyro_rb.diagnostics.report import LEGEND, Comparison

PROGRAM = "python -m pyro_rb"

DESCRIPTION = """\
Compares losses for stochastic variational inference on a model and guide: bias, gradient
variance and time per step, against a reference. Without --model it runs on two small models
with published data (eight schools, batting averages), before and after fitting."""

EPILOG = """\
examples:
  python -m pyro_rb
  python -m pyro_rb --model mymodule:model --guide mymodule:guide --args mymodule:make_args
  python -m pyro_rb --model mymodule:model --guide pyro.infer.autoguide:AutoNormal \\
      --args mymodule:make_args --train-steps 2000 --json result.json --plot result.svg
  python -m pyro_rb --losses STLTrace_ELBO:0.5 Trace_ELBO:num_particles=4
  python -m pyro_rb --losses DReG_ELBO:num_particles=8 \\
      --reference RenyiELBO:alpha=0,num_particles=8,vectorize_particles=True

Modules are looked for in the current directory first. --guide may also name an AutoGuide
class, or a function whose only argument is called "model" and that returns the guide.
make_args() returns the arguments of model and guide: a tuple, or (tuple, dict)."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Runs the command line.

    :param list argv: Arguments. Default: ``sys.argv[1:]``.
    :returns: The exit status: 0, or 2 after an error, or 130 after Ctrl-C.
    :rtype: int
    """
    options = _parser().parse_args(argv)
    try:
        with _current_directory_first():
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
    _check_options(options)
    with _device(options.device):
        comparisons = []
        for job in _jobs(options):
            comparison = compare(
                losses=options.losses,
                reference=options.reference,
                num_samples=options.num_samples,
                num_burn_in=options.burn_in,
                seed=options.seed,
                progress=not options.no_progress,
                **job,
            )
            print(comparison.table(), end="\n\n", flush=True)
            comparisons.append(comparison)
    print(LEGEND)
    _write(options, comparisons)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="MODULE:NAME", help="the model")
    add("--guide", metavar="MODULE:NAME", help="the guide (default: AutoNormal)")
    add("--args", metavar="MODULE:NAME", help="function that makes the arguments (default: none)")
    add(
        "--losses",
        metavar="LOSS",
        nargs="+",
        help="ELBO classes of Pyro or pyro_rb by name, with arguments after a colon "
        f"(default: {' '.join(DEFAULT_LOSSES)})",
    )
    add(
        "--reference",
        metavar="LOSS",
        default=REFERENCE,
        help=f"the loss that the others are compared to ({REFERENCE})",
    )
    add(
        "--train-steps",
        metavar="N",
        nargs="+",
        type=int,
        help="measure before, halfway and after N training steps with the reference; several "
        "numbers say when to measure (default: 0 with --model, else 0 1000)",
    )
    add("--learning-rate", metavar="RATE", type=float, help="of Adam in training (default: 0.01)")
    add("--num-samples", metavar="N", type=int, default=300, help="gradients of each loss (300)")
    add("--burn-in", metavar="N", type=int, default=100, help="gradients drawn before (100)")
    add("--seed", metavar="N", type=int, default=0, help="random seed (0)")
    add("--device", default="cpu", help="torch device, such as cuda (cpu)")
    add("--json", metavar="FILE", help="also write all results as JSON")
    add("--plot", metavar="FILE", help="also draw variance against time (needs matplotlib)")
    add("--no-progress", action="store_true", help="show no progress bar")
    add("--traceback", action="store_true", help="on an error show the full traceback")
    add("--version", action="version", version=f"pyro_rb {__version__}")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    if options.model is None:
        for name in ("guide", "args"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --model")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed: expected 0 to 2**32 - 1, got {options.seed}")
    if options.num_samples < 2:
        raise ValueError(f"--num-samples: expected at least 2, got {options.num_samples}")
    if options.burn_in < 0:
        raise ValueError(f"--burn-in: expected 0 or more, got {options.burn_in}")
    if options.train_steps is not None and min(options.train_steps) < 0:
        raise ValueError(f"--train-steps: expected 0 or more, got {min(options.train_steps)}")
    if options.learning_rate is not None and not options.learning_rate > 0:
        raise ValueError(f"--learning-rate: expected more than 0, got {options.learning_rate}")
    if options.losses is not None:
        make_losses(options.losses)
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None:
            folder = os.path.dirname(path) or "."
            if not os.path.isdir(folder):
                raise ValueError(f"--{name}: there is no directory {folder!r}")
            if os.path.isdir(path):
                raise ValueError(f"--{name}: {path!r} is a directory")
            if not os.access(path if os.path.exists(path) else folder, os.W_OK):
                raise ValueError(f"--{name}: cannot write to {path!r}")
    if options.plot is not None:
        check_plot_path(options.plot)


def _jobs(options: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """The arguments of each :func:`compare`, apart from those that are common to all."""
    steps = options.train_steps
    if steps is not None and len(steps) == 1:
        steps = steps[0]
    if options.model is not None:
        model = load_model(options.model)
        guide = load_guide(options.guide, model)
        args, kwargs = load_args(options.args)
        for part in (model, guide):
            to_device(getattr(part, "__self__", part), options.device)
        title = f"Model {options.model}, guide {options.guide or 'AutoNormal'}"
        yield {
            "model": model,
            "guide": guide,
            "args": to_device(args, options.device),
            "kwargs": to_device(kwargs, options.device),
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
        if options.plot is not None:
            plot_comparisons(comparisons, options.plot)
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
