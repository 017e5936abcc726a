# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The options of ``python -m pyro_rb``, and whether they make sense."""

import argparse
import os
import platform
from typing import Any, Callable, Dict, List, Tuple

import pyro
import torch

from pyro_rb import __version__
from pyro_rb.diagnostics.check.unbiased import METHODS
from pyro_rb.diagnostics.guard.guard import ON_BAD
from pyro_rb.diagnostics.run.losses import make_losses
from pyro_rb.diagnostics.show.plot import KINDS, check_plot_path

PROGRAM = "python -m pyro_rb"

DESCRIPTION = """\
Measures gradient estimators for stochastic variational inference in Pyro on your model.
The default command is compare. Without --model it runs on two small models with published data."""

EPILOG = """\
examples:
  python -m pyro_rb
  python -m pyro_rb --model my_script:model --guide my_script:guide
  python -m pyro_rb --model path/to/my_script.py:model --args path/to/my_script.py:make_args
  python -m pyro_rb compare --model my_script:model --guide pyro.infer.autoguide:AutoNormal \\
      --train-steps 2000 --json result.json --html result.html
  python -m pyro_rb compare --rel-error 0.05 --max-seconds 300 --plot result.svg
  python -m pyro_rb compare --losses STLTrace_ELBO:0.5 Trace_ELBO:num_particles=4
  python -m pyro_rb compare --losses DReG_ELBO:num_particles=8 \\
      --reference RenyiELBO:alpha=0,num_particles=8,vectorize_particles=True

Defaults are in parentheses. Modules are looked for in the current directory first. --guide
may also name an AutoGuide class, or a function whose only argument is called "model" and that
returns the guide.
make_args() returns the arguments of model and guide: a tuple, or (tuple, dict). Without --args
they are taken from the model's script: make_args(), args, or variables with the names of the
model's arguments."""


def versions() -> str:
    """
    Of all that matters.

    **Example**

    >>> print(versions())  # doctest: +ELLIPSIS
    pyro_rb ..., Python ..., PyTorch ..., Pyro ..., ...
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return (
        f"pyro_rb {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Pyro {pyro.__version__}, {platform.system()}, {device}"
    )


def parse(argv: List[str]) -> argparse.Namespace:
    """The options of a command line; ``options.command`` is the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(PROGRAM, None, DESCRIPTION, EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=versions(), help="versions, for a bug report")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (what, add_options) in COMMANDS.items():
        # Old habits: the general help of a command shows the examples, too.
        one = commands.add_parser(name, help=what, description=what, epilog=EPILOG, formatter_class=formatter)
        _add_model_options(one.add_argument)
        add_options(one.add_argument)
        _add_output_options(one.add_argument)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        argv = ["compare", *argv]
    return parser.parse_args(argv)


def _add_model_options(add: Callable) -> None:
    add("--model", metavar="MODULE:NAME", help="the model; also path/to/file.py:NAME")
    add("--guide", metavar="MODULE:NAME", help="the guide (AutoNormal)")
    add("--args", metavar="MODULE:NAME", help="function that makes the arguments of both (see below)")
    add("--batches", action="store_true", help="call that function before each step, for a new minibatch")


def _add_output_options(add: Callable) -> None:
    add("--seed", metavar="N", type=int, default=0, help="random seed (0)")
    add("--device", default="cpu", help="torch device, such as cuda (cpu)")
    add("--json", metavar="FILE", help="also write all results as JSON")
    add("--html", metavar="FILE", help="also write an HTML page with tables and figures")
    add("--plot", metavar="FILE", help="also draw a figure (needs matplotlib)")
    add("--no-progress", action="store_true", help="show no progress bar")
    add("--traceback", action="store_true", help="on an error show the full traceback")


def _add_compare_options(add: Callable) -> None:
    add("--losses", metavar="LOSS", nargs="+", help="losses by name, with arguments after a colon (those that apply)")
    add("--reference", metavar="LOSS", help="what they are compared with (Trace_ELBO; TraceEnum_ELBO if the model "
        "enumerates a site)")  # fmt: skip
    add("--train-steps", metavar="N", nargs="+", type=int, help="measure before, halfway and after N training steps "
        "with the reference; several numbers say when to measure")  # fmt: skip
    add("--train", metavar="SECONDS", type=float, nargs="?", const=5.0, default=0.0, help="also train with each of "
        "the best losses for so long (5), with several seeds and learning rates")  # fmt: skip
    add("--steps", metavar="N", type=int, help="how many steps you intend, over which a compilation is to "
        "pay; 0: compile nothing (10000; 0 with --losses)")  # fmt: skip
    add("--learning-rate", metavar="RATE", type=float, help="learning rate of Adam in training (0.01)")
    add("--num-samples", metavar="N", type=int, default=300, help="gradients of each loss (300)")
    add("--burn-in", metavar="N", type=int, default=100, help="gradients drawn first and thrown away (100)")
    add("--rel-error", metavar="SHARE", type=float, help="sample until the standard error of each variance ratio "
        "is at most this share of it, such as 0.05")  # fmt: skip
    add("--max-seconds", metavar="SECONDS", type=float, help="stop sampling after this time for a model (no limit; "
        "600 with --rel-error)")  # fmt: skip
    kinds = ", ".join(KINDS)
    add("--plot-kind", metavar="KIND", choices=list(KINDS), default="efficiency", help=f"{kinds} (efficiency)")


def _add_loss(add: Callable) -> None:
    add("--loss", metavar="LOSS", default="Trace_ELBO", help="the loss (Trace_ELBO)")


def _add_check_options(add: Callable) -> None:
    _add_loss(add)
    add("--reference", metavar="LOSS", help="what to compare it with (Trace_ELBO; TraceEnum_ELBO where that is biased)")
    add("--method", choices=METHODS, help="how to compare (paired); exact: the reference has no noise")
    add("--num-samples", metavar="N", type=int, default=1000, help="gradients of each loss (1000)")
    add("--burn-in", metavar="N", type=int, default=0, help="gradients drawn first and thrown away (0)")
    add("--failure-rate", metavar="RATE", type=float, default=1e-4, help="how often an unbiased loss may fail (0.0001)")
    add("--detect", metavar="SHARE", type=float, help="also fail if a bias of this share of the gradient could not "
        "be seen")  # fmt: skip


def _add_noise_options(add: Callable) -> None:
    _add_loss(add)
    add("--num-samples", metavar="N", type=int, default=400, help="number of draws (400)")
    add("--burn-in", metavar="N", type=int, default=0, help="draws made first and thrown away (0)")
    add("--rel-error", metavar="SHARE", type=float, nargs="+", default=[0.1], help="wanted error of the "
        "gradient, as a share of it (0.1)")  # fmt: skip


def _add_fit_options(add: Callable) -> None:
    _add_loss(add)
    add("--max-steps", metavar="N", type=int, default=10000, help="most steps (10000)")
    add("--learning-rate", metavar="RATE", type=float, default=0.01, help="learning rate of Adam (0.01)")
    add("--tolerance", metavar="NATS", type=float, help="the gain that is not worth waiting for (a third of the noise)")
    add("--on-bad", choices=ON_BAD, default="raise", help="what to do when a gradient is not finite (raise)")
    add("--save", metavar="FILE", help="save the param store")


#: What each command does, and its options.
COMMANDS: Dict[str, Tuple[str, Callable]] = {
    "compare": ("Compares losses: bias, variance, time and memory of their gradients.", _add_compare_options),
    "check": ("Is the gradient of a loss unbiased? Ends with status 1 if not.", _add_check_options),
    "noise": ("How many particles does a given precision of the gradient take?", _add_noise_options),
    "fit": ("Trains until the loss no longer falls, guarded against NaN.", _add_fit_options),
}


def check_options(options: argparse.Namespace) -> None:
    """
    :raises ValueError: If a value is out of range, or a file could not be written.
    :raises ImportError: If a figure is asked for and matplotlib is missing.
    """
    given = vars(options)
    if options.model is None:
        if options.command != "compare":
            raise ValueError(f"{options.command} needs --model")
        for name in ("guide", "args"):
            if given[name] is not None:
                raise ValueError(f"--{name} needs --model")
    at_least: Dict[str, float] = {"num_samples": 2, "burn_in": 0, "train_steps": 0, "steps": 0, "max_steps": 1}
    for name, least in at_least.items():
        values: Any = given.get(name)
        if values is not None and _smallest(values) < least:
            expected = "0 or more" if least == 0 else f"at least {least:.0f}"
            raise ValueError(f"{_flag(name)}: expected {expected}, got {_smallest(values)}")
    for name in ("learning_rate", "rel_error", "max_seconds"):
        values = given.get(name)
        if values is not None and not _smallest(values) > 0:
            raise ValueError(f"{_flag(name)}: expected more than 0, got {_smallest(values)}")
    if given.get("plot_kind") == "race" and not options.train:
        raise ValueError("--plot-kind race needs --train")
    if given.get("losses") is not None:
        make_losses(options.losses)
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed: expected 0 to 2**32 - 1, got {options.seed}")
    for name in ("json", "html", "plot", "save"):
        if given.get(name) is not None:
            _check_file(_flag(name), given[name])
    if options.plot is not None:
        check_plot_path(options.plot)


def _check_file(flag: str, path: str) -> None:
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"{flag}: there is no directory {folder!r}")
    if os.path.isdir(path):
        raise ValueError(f"{flag}: {path!r} is a directory")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{flag}: cannot write to {path!r}")


def _smallest(values: Any) -> Any:
    return min(values) if isinstance(values, list) else values


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
