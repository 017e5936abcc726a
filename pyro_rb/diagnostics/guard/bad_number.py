# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Where does the first number arise that is not finite? :func:`find_bad_number` repeats a step
with the same random numbers and looks at each site, forwards and then backwards.
"""

import copy
import math
import re
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

import pyro_rb
from pyro_rb.diagnostics.guard import site_checks
from pyro_rb.diagnostics.run.parameters import module_parameters
from pyro_rb.diagnostics.run.sites import unconstrained
from pyro_rb.diagnostics.run.state import preserve_state
from pyro_rb.infer.generators import set_torch_generators

_LIBRARIES = (*torch.__path__, *pyro.__path__, *pyro_rb.__path__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


@dataclass(frozen=True)
class BadNumber:
    """
    The first number of a step that was not finite. Prints as a sentence.

    :param str kind: ``"parameter"``: a parameter was bad before the step. ``"argument"``: that of a
        site's distribution; also a number out of range, such as a scale of 0. ``"value"``: drawn by
        a guide site, or observed. ``"log_prob"``: that of a site. ``"matrix"``: a matrix could not
        be decomposed, after the site. ``"gradient"``: the forward pass is finite, a derivative is
        not. ``"unknown"``.
    :param str role: ``"guide"`` or ``"model"``; empty for parameters and if unknown.
    :param str site: Name of the site or parameter; empty if unknown.
    :param str text: What was found, in words.
    :param str code: The line of code whose matrix or derivative is bad, if it is known.
    """

    kind: str
    role: str = ""
    site: str = ""
    text: str = ""
    code: str = ""

    def __str__(self) -> str:
        where = f"at {self.role} site {self.site!r}, " if self.role else ""
        return f"{where}{self.text}" + (f"; it comes from {self.code}" if self.code else "")


class Call(NamedTuple):
    """
    What a step was, so that it can be repeated.

    :param str entrance: ``"loss_and_grads"`` or ``"differentiable_loss"``.
    :param generators: What :func:`~pyro_rb.infer.generators.get_torch_generators` returned before the step.
    :param nesting: The ``max_plate_nesting`` of the loss before the step, infinite if it is to be found.
    """

    entrance: str
    model: Callable
    guide: Callable
    args: Sequence
    kwargs: Dict[str, Any]
    generators: Any
    nesting: float


def find_bad_number(loss: Any, call: Call) -> Optional[BadNumber]:
    """
    Repeats a step and returns the first number that is not finite, in the order: parameters;
    then for each site of the guide, then of the model, its distribution's arguments, its
    value and its log probability; then derivatives.

    Parameters, modules and random number generators are left as they were.

    :param loss: The loss; it is copied.
    :returns: None if all is finite.
    """
    model, guide = call.model, call.guide
    with preserve_state(model, guide, call.args, call.kwargs), pyro.validation_enabled(False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log = _repeat(loss, call)
            with torch.no_grad():
                found = _in_parameters(log, model, guide) or _in_forward_pass(log)
            found = found or _in_matrix(log) or _in_derivatives(log) or log.first_bad
            if found is None or found.kind != "gradient":
                return found
            caught.clear()
            with torch.autograd.set_detect_anomaly(True):
                _repeat(loss, call)
            return replace(found, code=_code_of_derivative(caught))


class _SiteLog(Messenger):
    """Records the parameters and sites of a step, in the order in which they are run."""

    def __init__(self) -> None:
        super().__init__()
        self.role = ""
        self.params: Dict[str, Any] = {}
        self.sites: List[Tuple[str, Any]] = []
        self.first_bad: Optional[BadNumber] = None  # in the backward pass
        self.error: Optional[Exception] = None
        self._hooks: List[Any] = []

    def as_role(self, role: str, function: Callable) -> Callable:
        """The model or guide, whose sites are recorded under this role."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.role = self.role, role
            try:
                return function(*args, **kwargs)
            finally:
                self.role = before

        return run

    def _pyro_post_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.params:
            self.watch_parameter(name, unconstrained(msg["value"]))
        self.params[name] = msg["value"]

    def watch_parameter(self, name: str, tensor: Tensor) -> None:
        """The last stretch of the backward pass: from the sites to a parameter."""
        self._watch(f"parameter {name!r}", tensor, "", name)

    def forget(self) -> None:
        """Parameters outlive the step, and hooks stay with them."""
        for hook in self._hooks:
            hook.remove()

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.sites.append((self.role, msg.copy()))
        if torch.is_grad_enabled():
            at = (self.role, msg["name"])
            self._watch("the value", msg["value"], *at)
            for name, tensor, _ in site_checks.arguments_of(msg["fn"]):
                self._watch(f"argument {name!r} of {site_checks.describe(msg['fn'])}", tensor, *at)

    def _watch(self, what: str, tensor: Any, role: str, name: str) -> None:
        def hook(grad: Optional[Tensor]) -> None:
            # The backward pass goes from the loss to the parameters. Where nothing depends on
            # the tensor there is no gradient.
            bad = torch.tensor(False) if grad is None else ~grad.isfinite()
            if grad is not None and self.first_bad is None and bad.any():
                text = f"the derivative of the loss with respect to {what} is {site_checks.show(grad, bad)}"
                self.first_bad = BadNumber("gradient", role, name, text)

        if isinstance(tensor, Tensor) and tensor.requires_grad:
            self._hooks.append(tensor.register_hook(hook))


def _repeat(loss: Any, call: Call) -> _SiteLog:
    log = _SiteLog()
    set_torch_generators(call.generators)
    loss = _fresh_copy(loss)
    if call.nesting == math.inf:
        # It is found by a run of its own, which draws random numbers.
        uncompiled = uncompiled_of(loss)
        uncompiled.max_plate_nesting = math.inf
        guess = uncompiled._guess_max_plate_nesting

        def guess_again(*args: Any, **kwargs: Any) -> None:
            guess(*args, **kwargs)
            log.sites.clear()

        uncompiled._guess_max_plate_nesting = guess_again
    run = getattr(loss, call.entrance)
    model, guide = log.as_role("model", call.model), log.as_role("guide", call.guide)
    for name, tensor in module_parameters(call.model, call.guide).items():
        log.watch_parameter(name, tensor)
    try:
        with log, torch.enable_grad():
            value = run(model, guide, *call.args, **call.kwargs)
        if isinstance(value, Tensor) and value.requires_grad:
            value.backward()
    except Exception as error:  # what the step itself raised, or detect_anomaly did
        log.error = error
    finally:
        log.forget()
    return log


def _in_parameters(log: _SiteLog, model: Callable, guide: Callable) -> Optional[BadNumber]:
    found = {**log.params, **module_parameters(model, guide)}
    for name, value in found.items():
        for what, tensor in (("", unconstrained(value)), (", constrained,", value)):
            bad = ~tensor.isfinite()
            if bad.any():
                text = f"parameter {name!r}{what} was {site_checks.show(tensor, bad)} before the step"
                return BadNumber("parameter", site=name, text=text)
    return None


def _in_forward_pass(log: _SiteLog) -> Optional[BadNumber]:
    for role, site in log.sites:
        checks = (
            ("argument", site_checks.find_bad_argument),
            ("value", site_checks.find_bad_value),
            ("log_prob", site_checks.find_bad_log_prob),
        )
        for kind, find in checks:
            text = find(site)
            if text is not None:
                return BadNumber(kind, role, site["name"], text)
    for role, site in log.sites:  # a density of zero: the cause if there is no other
        text = site_checks.find_bad_log_prob(site, infinite=True)
        if text is not None:
            return BadNumber("log_prob", role, site["name"], text)
    return None


def _in_derivatives(log: _SiteLog) -> Optional[BadNumber]:
    for role, site in log.sites:
        text = site_checks.find_bad_derivative(site)
        if text is not None:
            return BadNumber("gradient", role, site["name"], text)
    return None


def _in_matrix(log: _SiteLog) -> Optional[BadNumber]:
    if not isinstance(log.error, torch.linalg.LinAlgError):
        return None
    role, name = (log.sites[-1][0], log.sites[-1][1]["name"]) if log.sites else ("", "")
    text = f"{'or after it, ' if name else ''}a matrix could not be decomposed: {log.error}"
    frames = traceback.extract_tb(log.error.__traceback__)
    listed = [(f.filename, str(f.lineno), f.name, f.line or "") for f in frames]
    return BadNumber("matrix", role, name, text, _innermost(listed))


def uncompiled_of(loss: Any) -> Any:
    """The loss inside of one that :func:`pyro_rb.compile` made, or the loss itself."""
    return getattr(loss, "eager", loss)


def _fresh_copy(loss: Any) -> Any:
    """A copy; of a compiled loss, which runs no sites, one that is not compiled."""
    cls: Any = type(loss)
    if not cls.__name__.startswith("Jit"):
        return copy.deepcopy(loss)
    plain = cls.__mro__[1].__new__(cls.__mro__[1])
    plain.__dict__.update(loss.__dict__)
    return plain


def _code_of_derivative(caught: Sequence[Any]) -> str:
    """The line in the traceback that detect_anomaly gives as a warning, and its operation."""
    for warning in caught:
        text = str(warning.message)
        if "forward call that caused the error" in text:
            code = _innermost(_FRAME.findall(text))
            operation = re.search(r"Error detected in (\w+)", text)
            return f"{code} ({operation[1]})" if code and operation else code
    return ""


def _innermost(frames: Sequence[Tuple[str, str, str, str]]) -> str:
    """The last line of code that is in no library, of those behind the call from here."""
    start = max((i for i, frame in enumerate(frames) if frame[0] == __file__), default=0)
    for file, line, function, source in reversed(frames[start:]):
        if not file.startswith(_LIBRARIES):
            return f"{Path(file).name}:{line}, in {function}: {source.strip()}"
    return ""
