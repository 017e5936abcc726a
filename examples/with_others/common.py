# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the scripts of this folder share: their options, and a table with a row for each loss."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package ``support`` is

from support import command_line  # noqa: E402
from support.command_line import restart, set_up  # noqa: E402
from support.losses import add_loss_option, train_each  # noqa: E402
from support.results import report  # noqa: E402
from support.training import Clock  # noqa: E402


def run(doc, train, num_steps, lr, losses=("Trace_ELBO", "STLTrace_ELBO"), options=()):
    """
    The script.

    :param callable train: of the name of a loss and of ``args``, with ``num_steps`` and ``lr``; returns the ELBO.
    :param dict options: others, by name, with the arguments of ``add_argument``.
    """

    def row(name, args):
        restart(args.seed)
        with Clock() as clock:
            elbo = train(name, args)
        return {"loss": name, "ELBO, nats": f"{elbo:.2f}", "seconds": f"{clock.seconds:.1f}"}

    def main(args):
        set_up(args)
        args.num_steps = 4 if args.smoke_test else args.num_steps
        report(args, train_each(args.loss, row, args))

    parser = command_line.make_parser(doc)
    add_loss_option(parser, losses)
    parser.add_argument("--num-steps", type=int, default=num_steps, help="steps of training")
    parser.add_argument("--lr", type=float, default=lr, help="learning rate of Adam")
    for option, values in dict(options).items():
        parser.add_argument(option, **values)
    command_line.run(main, parser)
