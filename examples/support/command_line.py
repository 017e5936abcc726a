# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Options that all examples have, and how a script starts and ends."""

import argparse
import sys

import pyro
import torch


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and defaults where there are any."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, False, argparse.SUPPRESS):
            return action.help
        text = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help or ''} (default: {text})".strip()


def find_device(name):
    """
    The name of a device that is there.

    :raises SystemExit: If it is not, in one line.
    """
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SystemExit(f"--device {name}: {reason}. Expected a device of this machine, as cpu or cuda.") from error
    return name


def make_parser(doc, seed=0, out=True, device=True):
    """
    A parser with the options that all scripts have.

    :param str doc: docstring of the script.
    :param int seed: default of ``--seed``; None for no such option.
    :param bool out: whether there is an option ``--out``.
    :param bool device: whether there is an option ``--device``.
    """
    description = doc.strip().replace("::\n", ":\n")
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    if seed is not None:
        parser.add_argument("--seed", type=int, default=seed, help="of all random numbers")
    if device:
        parser.add_argument("--device", type=find_device, default="cpu", help="as PyTorch names it: cpu, cuda, cuda:1")
    if out:
        help = "write the results to PREFIX.json, PREFIX.csv and, if there is a figure, PREFIX.png"
        parser.add_argument("--out", metavar="PREFIX", help=help)
    parser.add_argument("--smoke-test", action="store_true", help="tiny sizes, nothing kept; for a few seconds")
    return parser


def make_digit_parser(doc, lr=1e-3):
    """
    These, and the options of experiments that train on digits.

    :param lr: default of ``--lr``, a number, or a list to choose from.
    """
    parser = make_parser(doc, seed=None)
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    many = {"nargs": "+", "help": "of Adam, to choose from"} if isinstance(lr, list) else {"help": "of Adam"}
    parser.add_argument("--lr", type=float, default=lr, **many)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of all random numbers, one run for each")
    parser.add_argument("--num-threads", type=int, default=1, help="of PyTorch")
    return parser


def run(main, parser):
    """Calls ``main`` with the options of the command line. An interrupt ends it without a traceback."""
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def set_up(args, num_threads=1):
    """New tensors go to ``--device``; random numbers and parameters start afresh."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.set_default_device(args.device)
    restart(getattr(args, "seed", 0))


def restart(seed):
    """Forgets all parameters, and starts the random numbers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
