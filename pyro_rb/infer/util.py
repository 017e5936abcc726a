# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The one place that touches Pyro's private names.
"""

import weakref
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, Mapping, Tuple

import torch
from pyro import get_param_store
from pyro.infer.traceenum_elbo import _check_tmc_elbo_constraint, _compute_model_factors
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import _ENUM_ALLOCATOR
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger

from pyro_rb.ops.transforms import is_inside_of_func

check_tmc_elbo_constraint = _check_tmc_elbo_constraint
compute_model_factors = _compute_model_factors


def is_replayed() -> bool:
    """
    Whether the code runs inside of a handler that may supply values of sample sites,
    so that a guide's values need not be draws of its distributions.

    >>> import pyro
    >>> is_replayed()
    False
    >>> with pyro.poutine.replay(trace=pyro.poutine.Trace()):
    ...     is_replayed()
    True
    """
    return any(isinstance(frame, ReplayMessenger) for frame in _PYRO_STACK)


def under(messenger: Messenger, fn: Callable) -> Callable:
    """
    Returns ``fn`` such that it runs under a messenger outside of all that are, and inside of
    each that may stop a message: what it makes of a value, all others see.

    >>> outer, inner = Messenger(), Messenger()
    >>> with inner:
    ...     under(outer, lambda: _PYRO_STACK == [outer, inner])()
    True
    """
    return partial(_run_under, messenger, fn)


def _run_under(messenger: Messenger, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    with messenger:  # starts it anew
        pass
    installed: Dict[int, Messenger] = {
        i + 1: _InsideBlock(frame, messenger)
        for i, frame in enumerate(_PYRO_STACK)
        if isinstance(frame, BlockMessenger)
    }
    for place in sorted(installed, reverse=True):
        _PYRO_STACK.insert(place, installed[place])
    _PYRO_STACK.insert(0, messenger)
    try:
        return fn(*args, **kwargs)
    finally:
        for frame in [messenger, *installed.values()]:
            _PYRO_STACK.remove(frame)


class _InsideBlock(Messenger):
    """Hands to a messenger outside of a block the messages that the block stops."""

    def __init__(self, block: BlockMessenger, messenger: Messenger) -> None:
        super().__init__()
        self._block, self._messenger = block, messenger

    def _process_message(self, msg: Any) -> None:
        if self._block.hide_fn(msg):
            self._messenger._process_message(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if self._block.hide_fn(msg):
            self._messenger._postprocess_message(msg)


def reserve_dims(leftmost: int) -> None:
    """Gives sites outside of :func:`pyro.markov`, from now on, dims left of ``leftmost``."""
    _ENUM_ALLOCATOR.next_available_dim = min(_ENUM_ALLOCATOR.next_available_dim, leftmost - 1)


def forget_parameters() -> None:
    """
    Makes the ``SVI.step`` that is being made believe that there are no parameters, so that it
    does not call its optimizer.

    >>> import pyro, torch
    >>> with pyro.poutine.trace(param_only=True) as capture:
    ...     _ = pyro.param("loc", torch.zeros(()))
    ...     forget_parameters()
    >>> list(capture.trace.nodes)
    []
    """
    for frame in _PYRO_STACK:
        if isinstance(frame, TraceMessenger) and frame.param_only:
            for name in frame.trace.param_nodes:
                frame.trace.remove_node(name)


def compute_baseline(name: str, site: Any, downstream_cost: torch.Tensor) -> Tuple[torch.Tensor, Any]:
    """
    Evaluates and updates what ``infer={"baseline": {...}}`` asks for at a guide site.

    :param downstream_cost: detached, of the shape of the site's batch.
    :return: the baseline, of the same shape, and the loss of its own parameters.
    :raises ValueError: naming the site, if the baseline has another shape.
    :raises NotImplementedError: inside of :mod:`torch.func`.
    """
    if is_inside_of_func():
        raise NotImplementedError(
            f"Found torch.func around infer={{'baseline': ...}} at guide site '{name}', which learns "
            "parameters of its own. Expected a site without it, or loss.backward()."
        )
    _, loss, baseline = _construct_baseline(name, site, downstream_cost)
    return torch.as_tensor(baseline, device=downstream_cost.device), loss


def parameter_table() -> Dict[str, torch.Tensor]:
    """The unconstrained parameters in the param store, by name; not a copy."""
    table: Dict[str, torch.Tensor] = get_param_store()._params
    return table


def set_parameter_table(table: Mapping[str, torch.Tensor]) -> None:
    """
    Puts back parameters that have been replaced or made since.

    :param table: a copy of what :func:`parameter_table` returned.
    """
    store = get_param_store()
    for name, parameter in list(store._params.items()):
        if table.get(name) is not parameter:
            store._param_to_name.pop(parameter, None)
            if name in table:
                store._params[name] = table[name]
                store._param_to_name[table[name]] = name
            else:
                del store._params[name], store._constraints[name]


def is_plain_call() -> bool:
    """Whether no handler is around the code but those that collect parameters, as SVI does."""
    return all(map(_only_collects, _PYRO_STACK))


def _only_collects(frame: Any) -> bool:
    if isinstance(frame, TraceMessenger):
        return bool(frame.param_only)
    cls = type(frame)
    is_plain = cls._process_message is Messenger._process_message
    is_plain &= cls._postprocess_message is Messenger._postprocess_message
    return is_plain and not any(hasattr(cls, name) for name in _ACTIVE)


#: Methods of handlers that do something to a site.
_ACTIVE = ("_pyro_sample", "_pyro_post_sample", "_pyro_subsample", "_pyro_post_subsample", "_pyro_param")


@contextmanager
def without_handlers() -> Iterator[None]:
    """Within, code runs as if there were no handler around it."""
    saved = _PYRO_STACK[:]
    _PYRO_STACK.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = saved


def announce_parameters(named: Mapping[str, torch.Tensor]) -> None:
    """
    Tells handlers that collect parameters that these were used, as their statements would.

    :param named: unconstrained parameters that are in the param store.

    >>> import pyro, torch
    >>> loc = pyro.param("loc", torch.zeros(()))
    >>> with pyro.poutine.trace(param_only=True) as capture:
    ...     announce_parameters({"loc": loc.unconstrained()})
    >>> list(capture.trace.nodes)
    ['loc']
    """
    for frame in _PYRO_STACK:
        for name, parameter in named.items() if hasattr(frame, "_pyro_post_param") else ():
            # As Pyro does for a parameter without a constraint.
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
            msg = {"type": "param", "name": name, "value": parameter}
            frame._pyro_post_param(msg)  # type: ignore[attr-defined]
