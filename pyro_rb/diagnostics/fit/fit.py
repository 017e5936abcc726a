# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Trains until the loss falls no more, with a guard: :func:`fit`."""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional

from pyro.infer import SVI

from pyro_rb.diagnostics.guard.guard import GradientGuard
from pyro_rb.diagnostics.run.arguments import Arguments, current_args
from pyro_rb.diagnostics.run.bar import bar
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.stats.stopping import Check, StopRule


@dataclass
class Fit:
    """
    What :func:`fit` has done. Prints as a few sentences.

    :param str loss: Name of the loss.
    :param list losses: Its value at each step; NaN where there was none.
    :param str stopped: ``"converged"``, ``"max_steps"`` or ``"interrupted"``.
    :param Check check: The last check of the stop rule; None if there was none.
    :param list bad_steps: Numbers of the steps that were not finite, the last 100 of them.
    :param str guard: What the guard says of them.
    """

    loss: str
    losses: List[float] = field(default_factory=list)
    stopped: str = "max_steps"
    check: Optional[Check] = None
    bad_steps: List[int] = field(default_factory=list)
    guard: str = ""

    def __str__(self) -> str:
        steps = len(self.losses)
        how = {
            "converged": f"converged after {steps} steps",
            "max_steps": f"not converged in {steps} steps",
            "interrupted": f"interrupted after {steps} steps",
        }
        last = [loss for loss in self.losses[-max(1, steps // 10) :] if math.isfinite(loss)]
        final = f", at a loss of {sum(last) / len(last):.6g} nats" if last else ""
        lines = [f"{self.loss}: {how[self.stopped]}{final}"]
        if self.check is not None and math.isinf(self.check.error):
            lines.append(f"at step {self.check.step} the run was too short to tell noise from drift")
        elif self.check is not None:
            lines.append(
                f"at step {self.check.step} the loss had fallen by {self.check.improvement:.3g} +/- "
                f"{self.check.error:.2g} from the third quarter of the run to the fourth; it stops "
                f"when that is surely below {self.check.tolerance:.2g}"
            )
        return "\n".join([*lines, self.guard] if self.bad_steps else lines)

    def to_dict(self) -> Dict[str, Any]:
        """All of it, ready for JSON except for numbers that are not finite."""
        check = None if self.check is None else self.check._asdict()
        return {**vars(self), "check": check}


def fit(
    loss: str,
    model: Callable,
    guide: Callable,
    optim: Any,
    args: Arguments = (),
    kwargs: Optional[Dict[str, Any]] = None,
    max_steps: int = 10000,
    tolerance: Optional[float] = None,
    on_bad: str = "raise",
    progress: bool = False,
) -> Fit:
    """
    Trains by :class:`~pyro.infer.svi.SVI`, with a
    :class:`~pyro_rb.diagnostics.guard.guard.GradientGuard` around the loss, until a
    :class:`~pyro_rb.diagnostics.stats.stopping.StopRule` says that the loss no longer falls.
    Parameters keep their last values, also after Ctrl-C.

    :param str loss: A name for :func:`~pyro_rb.diagnostics.run.losses.make_loss`.
    :param ~pyro.optim.optim.PyroOptim optim: The optimizer.
    :param args: Positional arguments of model and guide; or a function that returns them, which
        is called before each step.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int max_steps: Number of steps at most.
    :param float tolerance: That of the rule.
    :param str on_bad: That of the guard.
    :param bool progress: Whether to show a progress bar.
    :rtype: Fit

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> pyro.clear_param_store()
    >>> pyro.set_rng_seed(0)
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     loc = pyro.param("loc", torch.tensor(3.0))
    ...     pyro.sample("z", dist.Normal(loc, 1.))
    >>> found = fit("STLTrace_ELBO", model, guide, pyro.optim.Adam({"lr": 0.05}), tolerance=0.01)
    >>> found.stopped, bool(abs(pyro.param("loc")) < 0.1)
    ('converged', True)
    """
    guard = GradientGuard(make_loss(loss), on_bad=on_bad)
    rule = StopRule(tolerance)
    svi = SVI(model, guide, optim, guard)
    found = Fit(loss)
    try:
        with bar(progress, total=max_steps) as shown:
            for _ in range(max_steps):
                found.losses.append(float(svi.step(*current_args(args), **(kwargs or {}))))
                shown.update()
                if rule.update(found.losses[-1]):
                    found.stopped = "converged"
                    break
    except KeyboardInterrupt:
        found.stopped = "interrupted"
    found.check = rule.last_check
    found.bad_steps = [bad.step for bad in guard.bad_steps]
    found.guard = guard.summary()
    return found
