# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The option ``--loss``: any loss of Pyro or pyro_rb by name."""

import re
import sys
import traceback

import torch.distributed
from pyro.infer import RenyiELBO, TraceEnum_ELBO, config_enumerate

from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.infer import RaoBlackwellTopK_ELBO

#: What is said of errors of a type, where the loss's name and the text match a pattern: the reason, if
#: the text does not say it, and what to do. A NotImplementedError counts in any case.
REMEDIES = (
    (NotImplementedError, "only implemented for vectorize_particles", "{error}",
     "Give it several particles, as {name}:num_particles=4,vectorize_particles=True"),
    (NotImplementedError, "must be fully reparam", "{error}",
     "The guide has a discrete site: take RaoBlackwellTopK_ELBO, TraceEnum_ELBO or Trace_ELBO"),
    (AttributeError, "no attribute 'differentiable_loss'", "{error}",
     "Take Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO or a loss of pyro_rb"),
    (KeyError, "^Jit", "losses with Jit look for parameters in Pyro's param store, where none are here",
     "Take the loss without Jit"),
)  # fmt: skip


def add_loss_option(parser, default):
    """
    :param default: of the option, a name or names.
    """
    names = [default] if isinstance(default, str) else list(default)
    parser.add_argument(
        "--loss",
        type=check_name,
        nargs="+",
        default=names,
        metavar="LOSS",
        help="one or several, each trained from the same start: the name of a loss of Pyro or pyro_rb, "
        "with arguments after a colon, as Trace_ELBO:num_particles=4",
    )


def check_name(name):
    """
    A name of which a loss can be made.

    :raises SystemExit: If none can, in one line.
    """
    if name.partition(":")[0] == "Trace_MMD":
        raise SystemExit(
            "--loss Trace_MMD: it is no ELBO, and its kernels cannot be written on a command line. "
            "Expected another loss, as Trace_ELBO."
        )
    try:
        make_loss(name)
    except ValueError as error:
        raise SystemExit(f"--loss: {error}") from error
    return name


def mark_for(loss, guide):
    """
    A guide with discrete sites, as the loss needs it: marked by ``config_enumerate`` for
    ``TraceEnum_ELBO``, which sums over sites that are marked. Others see it as it is, since to
    ``RaoBlackwellTopK_ELBO`` a mark says that all values are to be summed.

    :raises NotImplementedError: For ``RenyiELBO`` with ``alpha=0``, which would not train the discrete sites.
    """
    if type(loss) is RenyiELBO and loss.alpha == 0:
        raise NotImplementedError(
            "with alpha=0 RenyiELBO gives no gradient to the parameters of the guide's discrete sites, "
            "and they would stay where they are. Take RaoBlackwellTopK_ELBO, TraceEnum_ELBO or Trace_ELBO"
        )
    is_enumerating = isinstance(loss, TraceEnum_ELBO) and not isinstance(loss, RaoBlackwellTopK_ELBO)
    return config_enumerate(guide) if is_enumerating else guide


def train_each(names, train, *args):
    """
    Calls ``train(name, *args)`` for each loss. Of a loss that does not apply to an example, one line
    says why; if it is the last one, and there is nothing to show, it ends the script.

    :return: list of what the calls return.
    """
    rows = []
    for name in names:
        try:
            rows.append(train(name, *args))
        except (AttributeError, KeyError, NotImplementedError) as error:
            reason = explain(name, error)
            if reason is None:
                raise
            if not rows and name == names[-1]:
                raise SystemExit(reason) from error
            if is_first_process():
                print(reason, file=sys.stderr)
    return rows


def explain(name, error):
    """Why the loss of that name does not apply, and what to do; None if the error says something else."""
    if not is_raised_by_pyro(error):
        return None
    text = str(error).strip().partition("\n")[0].rstrip(".")
    for kind, pattern, reason, remedy in (*REMEDIES, (NotImplementedError, "", "{error}", "")):
        if isinstance(error, kind) and re.search(pattern, f"{name}: {text}"):
            parts = ". ".join(filter(None, (reason, remedy)))
            parts = parts.format(error=text, name=name.partition(":")[0])
            return f"--loss {name} does not apply here: {parts}."
    return None


def is_raised_by_pyro(error):
    """Whether the code of Pyro or pyro_rb found the fault, rather than PyTorch or a script."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals["__name__"].partition(".")[0]
    return package in ("pyro", "pyro_rb", "support", "models")


def is_first_process():
    """Of several that train together, the first one talks."""
    is_one_of_several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not is_one_of_several or torch.distributed.get_rank() == 0
