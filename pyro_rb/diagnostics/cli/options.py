# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The options of ``python -m pyro_rb``."""

import argparse
import os

from pyro_rb import __version__
from pyro_rb.diagnostics.run.losses import make_losses
from pyro_rb.diagnostics.show.plot import KINDS, check_plot_path

PROGRAM = "python -m pyro_rb"

#: What else it does, by the word that comes first.
COMMANDS = ("check", "noise", "fit")

DESCRIPTION = """\
Compares losses for stochastic variational inference on a model and guide: bias, gradient
variance, time and memory per step, against a reference; and recommends one. Without --model
it runs on two small models with published data (eight schools, batting averages), before and
after fitting."""

EPILOG = """\
examples:
  python -m pyro_rb
  python -m pyro_rb --model mymodule:model --guide mymodule:guide --args mymodule:make_args
  python -m pyro_rb --model mymodule:model --guide pyro.infer.autoguide:AutoNormal \\
      --args mymodule:make_args --train-steps 2000 --json result.json --html result.html
  python -m pyro_rb --rel-error 0.05 --max-seconds 300 --plot result.svg
  python -m pyro_rb --losses STLTrace_ELBO:0.5 Trace_ELBO:num_particles=4
  python -m pyro_rb check --help    is the gradient of one loss unbiased?
  python -m pyro_rb noise --help    how many particles does a wanted precision take?
  python -m pyro_rb fit --help      train, guarded against NaN, until the loss falls no more
  python -m pyro_rb --losses DReG_ELBO:num_particles=8 \\
      --reference RenyiELBO:alpha=0,num_particles=8,vectorize_particles=True

Modules are looked for in the current directory first. --guide may also name an AutoGuide
class, or a function whose only argument is called "model" and that returns the guide.
make_args() returns the arguments of model and guide: a tuple, or (tuple, dict)."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_options(parser)
    add(
        "--losses",
        metavar="LOSS",
        nargs="+",
        help="ELBO classes of Pyro or pyro_rb by name, with arguments after a colon "
        "(default: those that apply to model and guide)",
    )
    add(
        "--reference",
        metavar="LOSS",
        help="the loss that the others are compared to (Trace_ELBO; TraceEnum_ELBO if the "
        "model enumerates a site)",
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
    add(
        "--rel-error",
        metavar="SHARE",
        type=float,
        help="go on sampling until the standard error of each variance ratio is at most this "
        "share of it, such as 0.05",
    )
    add(
        "--max-seconds",
        metavar="SECONDS",
        type=float,
        help="stop sampling after this time for a model (no limit; 600 with --rel-error)",
    )
    add_output_options(parser)
    add(
        "--plot-kind",
        metavar="KIND",
        choices=list(KINDS),
        default="efficiency",
        help=f"which figure: {', '.join(KINDS)} (efficiency)",
    )
    add("--version", action="version", version=f"pyro_rb {__version__}")
    return parser


def add_model_options(parser: argparse.ArgumentParser, is_required: bool = False) -> None:
    """What to run."""
    add = parser.add_argument
    add("--model", metavar="MODULE:NAME", required=is_required, help="the model")
    add("--guide", metavar="MODULE:NAME", help="the guide (default: AutoNormal)")
    add("--args", metavar="MODULE:NAME", help="function that makes the arguments (default: none)")
    add(
        "--batches",
        action="store_true",
        help="call that function before each step, not once: it returns a new minibatch",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """How to run it, and what to write."""
    add = parser.add_argument
    add("--seed", metavar="N", type=int, default=0, help="random seed (0)")
    add("--device", default="cpu", help="torch device, such as cuda (cpu)")
    add("--json", metavar="FILE", help="also write all results as JSON")
    add("--html", metavar="FILE", help="also write a page with tables, and figures")
    add("--plot", metavar="FILE", help="also draw a figure (needs matplotlib)")
    add("--no-progress", action="store_true", help="show no progress bar")
    add("--traceback", action="store_true", help="on an error show the full traceback")


def check_options(options: argparse.Namespace) -> None:
    """
    :raises ValueError: If a value is out of range, or a file could not be written.
    :raises ImportError: If a figure is asked for and matplotlib is missing.
    """
    if options.model is None:
        for name in ("guide", "args"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --model")
    if options.num_samples < 2:
        raise ValueError(f"--num-samples: expected at least 2, got {options.num_samples}")
    if options.burn_in < 0:
        raise ValueError(f"--burn-in: expected 0 or more, got {options.burn_in}")
    if options.train_steps is not None and min(options.train_steps) < 0:
        raise ValueError(f"--train-steps: expected 0 or more, got {min(options.train_steps)}")
    if options.learning_rate is not None and not options.learning_rate > 0:
        raise ValueError(f"--learning-rate: expected more than 0, got {options.learning_rate}")
    for name in ("rel_error", "max_seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected more than 0, got {value}")
    if options.losses is not None:
        make_losses(options.losses)
    check_output_options(options)


def check_output_options(options: argparse.Namespace) -> None:
    """As :func:`check_options`, of those options that all commands have."""
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed: expected 0 to 2**32 - 1, got {options.seed}")
    for name in ("json", "html", "plot"):
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
