# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A guard against gradients that are not finite: :class:`GradientGuard`."""

import math
import warnings
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from pyro.infer import ELBO, TraceTailAdaptive_ELBO
from torch import Tensor

from pyro_rb.diagnostics.guard.bad_number import (
    BadNumber,
    Call,
    find_bad_number,
    uncompiled_of,
)
from pyro_rb.diagnostics.guard.guarded_call import (
    FunctionLoss,
    SeenParameters,
    are_finite,
    grads_of,
    is_finite_loss,
)
from pyro_rb.diagnostics.run.parameters import module_parameters
from pyro_rb.infer.generators import get_torch_generators
from pyro_rb.infer.util import forget_parameters, parameter_table, set_parameter_table

ON_BAD = ("raise", "skip", "warn")

# Errors that bad numbers cause: of distributions that check them, of matrix decompositions.
_ERRORS = (ValueError, RuntimeError, ArithmeticError)


class NonFiniteError(FloatingPointError):
    """
    A loss or gradient is not finite.

    :param ~pyro_rb.diagnostics.guard.bad_number.BadNumber bad: Where that began.
    """

    def __init__(self, message: str, bad: Optional[BadNumber] = None) -> None:
        super().__init__(message)
        self.bad = bad


class BadStep(NamedTuple):
    """The number of a step whose loss or gradient was not finite, counted from 1, and where it began."""

    step: int
    bad: BadNumber


class GradientGuard(ELBO):
    """
    Wraps a loss. When the loss or a gradient is NaN or infinite, it says at which site that began,
    and keeps the bad numbers away from the parameters.

    With :class:`~pyro.infer.svi.SVI`, one line changes::

        svi = SVI(model, guide, optim, loss=GradientGuard(Trace_ELBO()))

    In a loop of your own, with an optimizer of PyTorch, two lines change: the guard also watches
    the optimizer, since the gradients come after the loss. Under ``DistributedDataParallel`` all
    processes see the same gradients, so all of them skip the same steps::

        guard = GradientGuard(Trace_ELBO(), on_bad="skip")
        elbo = guard(model, guide)
        optim = guard.watch(torch.optim.Adam(elbo.parameters()))

    The bad step is repeated with the same random numbers, and the first number that is not
    finite is looked for, in this order: a parameter before the step; then, site by site
    through the guide and the model, an argument of the distribution, the value, the log
    probability; then the derivatives. The repetition costs a few steps and leaves no trace. A
    model that does not do the same thing twice may hide the cause; the message then says so.
    Errors that distributions raise at such numbers ("Expected parameter loc ... invalid
    values") are caught too, and are given the name of the site; other errors pass through.

    :param ~pyro.infer.elbo.ELBO loss: Any loss of Pyro or pyro_rb, or one of your own: an
        object with ``loss_and_grads`` or ``differentiable_loss``, or a function of model,
        guide and their arguments. Its attributes and methods, such as ``report()``, can be
        reached through the guard.
    :param str on_bad: ``"raise"`` (default) raises an error before the optimizer steps. ``"skip"``
        returns the loss, or NaN if there is none, and removes the gradients. Parameters, and
        moments and learning rates of the optimizer, stay as they are. Buffers of modules, such as
        those of batch normalization, do not. ``"warn"`` warns at the first of several bad steps in
        a row, and makes them all.
    :param int max_skipped: How many steps may be skipped in a row, before an error is raised.
    :raises ValueError: If ``on_bad`` is none of these, or ``max_skipped`` is negative.
    :raises TypeError: If ``loss`` is no loss.
    :raises NonFiniteError: A :class:`FloatingPointError`, at a bad step: with ``"raise"`` always;
        with ``"skip"`` after ``max_skipped`` steps in a row, or if a parameter was bad already.

    Skipping steps is a bias: the draws that lead to bad numbers no longer count. A few skipped
    steps in a long run do no harm; if there are many, mend the model.

    **Attributes.** ``num_steps``, ``num_skipped``: how many steps there were since the guard was
    made, and how many it skipped. ``bad_steps``: the last 100 bad steps, each a :class:`BadStep`.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> pyro.clear_param_store()
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0., 1.))
    ...     pyro.sample("x", dist.Normal(z.sqrt(), 1.), obs=torch.tensor(1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(-9.)), 1.))
    >>> svi = SVI(model, guide, pyro.optim.Adam({}), loss=GradientGuard(Trace_ELBO()))
    >>> try:
    ...     loss = svi.step()
    ... except FloatingPointError as error:
    ...     print(error)
    step 1: ValueError was raised. First bad number: at model site 'x', argument 'loc' of Normal is nan
    """

    def __init__(self, loss: Any, on_bad: str = "raise", max_skipped: int = 10) -> None:
        # What ELBO.__init__ sets is that of the wrapped loss, see __getattr__.
        if isinstance(loss, type) or not (hasattr(loss, "loss_and_grads") or callable(loss)):
            raise TypeError(f"loss: expected a loss such as Trace_ELBO(), got {loss!r}")
        if on_bad not in ON_BAD:
            raise ValueError(f"on_bad: expected one of {ON_BAD}, got {on_bad!r}")
        if max_skipped < 0:
            raise ValueError(f"max_skipped: expected an integer >= 0, got {max_skipped}")
        self.wrapped: Any = loss if hasattr(loss, "loss_and_grads") else FunctionLoss(loss)
        self.on_bad = on_bad
        self.max_skipped = max_skipped
        self.num_steps = 0
        self.num_skipped = 0
        self.bad_steps: List[BadStep] = []
        self._in_a_row = 0
        self._is_watching = False
        self._last_call: Optional[Call] = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "wrapped" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_last_call": None}

    def summary(self) -> str:
        """How many steps were bad, and where they went wrong, most frequent first."""
        verb = "skipped" if self.on_bad == "skip" else "bad"
        count = self.num_skipped if self.on_bad == "skip" else len(self.bad_steps)
        lines = [f"{count} of {self.num_steps} steps {verb}"]
        causes = Counter((s.bad.kind, s.bad.role, s.bad.site) for s in self.bad_steps)
        for (kind, role, site), number in causes.most_common():
            where = f" at {role} site {site!r}" if role else f" {site!r}" if site else ""
            lines.append(f"{number} x {kind}{where}")
        return "\n".join(lines)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        """That of the wrapped loss, unguarded."""
        return self.wrapped.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        """
        Does what the wrapped loss does, and looks at the gradients.

        :returns: The loss; NaN if the step was skipped because it raised an error.
        """
        self.num_steps += 1
        call = Call("loss_and_grads", model, guide, args, kwargs, get_torch_generators(), self._nesting)
        before = dict(parameter_table())
        seen = SeenParameters()
        loss, error = math.nan, None
        try:
            with seen:
                loss = self.wrapped.loss_and_grads(model, guide, *args, **kwargs)
        except _ERRORS as caught:
            error = caught
        parameters = seen.tensors
        if error is None and self._is_finite(loss) and are_finite(grads_of(parameters.values())):
            self._in_a_row = 0
            return loss
        # What the loss has replaced, as TraceGraph_ELBO does with the average of a baseline.
        set_parameter_table({**parameter_table(), **before})
        self._handle(call, parameters, error)
        return loss

    @property
    def _nesting(self) -> float:
        loss = uncompiled_of(self.wrapped)
        return loss.max_plate_nesting if isinstance(loss, ELBO) else 0

    def _is_finite(self, loss: Any) -> bool:
        # TraceTailAdaptive_ELBO has gradients only: the loss that it returns is always infinite.
        return isinstance(self.wrapped, TraceTailAdaptive_ELBO) or is_finite_loss(loss)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        """
        Does what the wrapped loss does. Gradients are looked at when an optimizer that is watched steps.

        :raises RuntimeError: If ``on_bad`` is ``"skip"`` and no optimizer is watched.
        """
        if self.on_bad == "skip" and not self._is_watching:
            raise RuntimeError(
                "GradientGuard with on_bad='skip' in a loop of your own must know the "
                "optimizer whose steps to skip: write optim = guard.watch(optim) after it is made"
            )
        if not self._is_watching:
            self.num_steps += 1
        call = Call("differentiable_loss", model, guide, args, kwargs, get_torch_generators(), self._nesting)
        self._last_call = call
        seen = SeenParameters()
        error = None
        try:
            with seen:
                loss = self.wrapped.differentiable_loss(model, guide, *args, **kwargs)
        except _ERRORS as caught:
            error = caught
        if error is None and self._is_finite(loss):
            if not self._is_watching:
                self._in_a_row = 0
            return loss
        if self.on_bad == "skip":
            parameters = {**seen.tensors, **module_parameters(model, guide)}
            if error is not None and find_bad_number(self.wrapped, call) is None:
                raise error
            # A NaN to each gradient: also other processes must know that this step is bad.
            sums = [p.sum() for p in parameters.values() if p.requires_grad]
            return math.nan * torch.stack(sums).sum() if error is not None else math.nan * loss
        if self._is_watching and error is None and self.on_bad == "warn":
            return loss  # seen again, with its gradients, when the optimizer steps
        self.num_steps += self._is_watching
        self._handle(call, {}, error)
        return loss

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """
        Looks at all gradients of an optimizer of PyTorch before each of its steps.

        :param ~torch.optim.Optimizer optimizer: One that takes no closure.
        :returns: The same optimizer.
        :raises TypeError: If it is something else, such as a :class:`~pyro.optim.optim.PyroOptim`.
        """
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"expected a torch.optim.Optimizer that takes no closure, got {optimizer!r}; "
                "SVI needs no watch(): give the guard to it as its loss"
            )
        self._is_watching = True
        optimizer.register_step_pre_hook(self._before_step)
        return optimizer

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.num_steps += 1
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        if are_finite(grads_of(tensors)):
            self._in_a_row = 0
            return
        call = self._last_call
        named = {} if call is None else module_parameters(call.model, call.guide)
        names = {id(tensor): name for name, tensor in named.items()}
        parameters = {names.get(id(p), f"number {i}"): p for i, p in enumerate(tensors)}
        self._handle(call, parameters, None)

    def _handle(
        self, call: Optional[Call], parameters: Dict[str, Tensor], error: Optional[Exception]
    ) -> None:
        is_first = self._in_a_row == 0
        names = [repr(n) for n, p in parameters.items() if not are_finite(grads_of([p]))]
        if self.on_bad == "warn" and not is_first and error is None:
            self._in_a_row += 1
            return
        bad = None if call is None else find_bad_number(self.wrapped, call)
        if error is not None and bad is None:
            raise error
        if self.on_bad != "warn":
            for tensor in parameters.values():
                tensor.grad = None
            forget_parameters()
        if bad is None:
            bad = BadNumber(
                "unknown",
                text="none when the step was repeated with the same random numbers (was it in "
                "another process, or does the model remember?)",
            )
        self._in_a_row += 1
        self.bad_steps = [*self.bad_steps[-99:], BadStep(self.num_steps, bad)]
        what = f"the gradient of {', '.join(names)}" if names else "the loss"
        what = f"{what} is not finite" if error is None else f"{type(error).__name__} was raised"
        message = f"step {self.num_steps}: {what}. First bad number: {bad}"
        if self.on_bad == "warn" and error is None:
            warnings.warn(message, stacklevel=4)
        elif self.on_bad != "skip" or bad.kind == "parameter":
            raise NonFiniteError(message, bad) from error
        elif self._in_a_row > self.max_skipped:
            raise NonFiniteError(
                f"{self._in_a_row} steps in a row are not finite, max_skipped is "
                f"{self.max_skipped}. Last, {message}",
                bad,
            ) from error
        else:
            self.num_skipped += 1

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.wrapped._get_trace(model, guide, args, kwargs)
