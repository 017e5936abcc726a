# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Losses by name: ``STLTrace_ELBO:1.0``."""

import ast
import copy
import difflib
import inspect
import json
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import pyro.infer
from pyro.infer import (
    ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)

import pyro_rb.infer

Losses = Union[str, ELBO, Sequence[Union[str, ELBO]], Mapping[str, Union[str, ELBO]]]

REFERENCE = "Trace_ELBO"
#: TraceEnum_ELBO with all discrete sites of the guide enumerated in parallel.
ENUMERATED = "TraceEnum_ELBO+config_enumerate"


class ConfigEnumerate_ELBO(TraceEnum_ELBO):
    """
    :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` with
    :func:`~pyro.infer.enum.config_enumerate` around the guide. Each site of the guide that can be
    enumerated is, unless the site says otherwise.

    **Example**

    >>> make_loss("TraceEnum_ELBO+config_enumerate")  # doctest: +ELLIPSIS
    <pyro_rb.diagnostics.run.losses.ConfigEnumerate_ELBO object at ...>
    """

    def _get_traces(self, model: Any, guide: Any, args: Tuple, kwargs: Dict) -> Any:
        return super()._get_traces(model, config_enumerate(guide), args, kwargs)


def available_losses() -> Dict[str, Type[ELBO]]:
    """
    All ELBO classes of Pyro and pyro_rb, by name.

    **Example**

    >>> available_losses()["STLTrace_ELBO"].__name__
    'STLTrace_ELBO'
    """
    found = {}
    for room in (pyro.infer, pyro_rb.infer):
        for name, value in vars(room).items():
            if inspect.isclass(value) and issubclass(value, ELBO) and value is not ELBO:
                found[name] = value
    return dict(sorted(found.items()))


def make_loss(name: str) -> ELBO:
    """
    Makes a loss from its name.

    :param str name: The name of an ELBO class of Pyro or pyro_rb, optionally followed by a
        colon and constructor arguments separated by commas, of which those with ``=`` are
        keyword arguments: ``"Trace_ELBO:num_particles=10"``. Arguments are Python literals,
        else strings. Without ``=``, an integer is Pyro's first argument; anything else is the first
        option that a class of pyro_rb adds to Pyro's, if it adds one: ``"STLTrace_ELBO:1.0"``.
        ``"TraceEnum_ELBO+config_enumerate"`` also enumerates the guide.
    :raises ValueError: If there is no such class, or it does not take these arguments.

    **Example**

    >>> make_loss("Trace_ELBO:num_particles=10").num_particles
    10
    """
    cls, positional, keywords = _parse(name)
    try:
        return cls(*positional, **keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot make the loss {name!r}: {error}") from error


def copy_loss(loss: Any, role: str) -> ELBO:
    """
    A loss by its name, or a copy of one, so that what it learns stays with the copy.

    :param str role: The name of the argument.

    **Example**

    >>> copy_loss("Trace_ELBO:num_particles=10", "loss").num_particles
    10
    """
    if isinstance(loss, str):
        return make_loss(loss)
    if isinstance(loss, ELBO):
        try:
            return copy.deepcopy(loss)
        except Exception as error:
            raise TypeError(f"{role}: {type(loss).__name__} cannot be copied, by copy.deepcopy(): {error}") from error
    hint = f"; write {loss.__name__}()" if inspect.isclass(loss) and issubclass(loss, ELBO) else ""
    raise TypeError(f"{role}: expected the name of a loss or an instance of pyro.infer.ELBO, got {loss!r}{hint}")


def _parse(name: str) -> Tuple[Type[ELBO], List[Any], Dict[str, Any]]:
    class_name, _, rest = name.partition(":")
    classes: Dict[str, Type[ELBO]] = {**available_losses(), ENUMERATED: ConfigEnumerate_ELBO}
    if class_name not in classes:
        near = difflib.get_close_matches(class_name, classes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        own = "A loss of your own is given as an object, in Python"
        raise ValueError(f"no loss {class_name!r}: {hint}There are {', '.join(classes)}. {own}")
    positional: List[Any] = []
    keywords: Dict[str, Any] = {}
    option = _own_option(classes[class_name])
    for item in filter(None, rest.split(",")):
        key, equals, text = item.rpartition("=")
        value = _literal(text)
        if equals:
            keywords[key.strip()] = value
        elif option is None or isinstance(value, int):
            positional.append(value)
        else:
            keywords[option] = value
    return classes[class_name], positional, keywords


def _own_option(cls: Type[ELBO]) -> Optional[str]:
    """The first argument that is given by keyword only, as those of Pyro are not."""
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            return name
    return None


def with_options(name: str, reference: str) -> str:
    """
    A loss with the keyword arguments of another, as far as it takes them and has none of its own: what
    one loss needs to run on a model, others need as well.

    **Example**

    >>> with_options("TraceGraph_ELBO", "Trace_ELBO:retain_graph=True,max_plate_nesting=2")
    'TraceGraph_ELBO:retain_graph=True,max_plate_nesting=2'
    """
    for item in filter(None, reference.partition(":")[2].split(",")):
        key = item.partition("=")[0].strip()
        own = [part.partition("=")[0].strip() for part in name.partition(":")[2].split(",")]
        if "=" in item and key not in own:
            longer = f"{name}{',' if ':' in name else ':'}{item.strip()}"
            try:
                make_loss(longer)
            except ValueError:
                continue
            name = longer
    return name


def has_elbo(name: str) -> bool:
    """
    Whether a loss has the ELBO for its objective.

    >>> has_elbo("RenyiELBO:alpha=0")
    False
    """
    return is_elbo(make_loss(name))


def is_elbo(loss: ELBO) -> bool:
    """
    As :func:`has_elbo`, for an instance.

    **Example**

    >>> is_elbo(make_loss("RenyiELBO:alpha=0"))
    False
    """
    elbos = (Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO)
    return isinstance(loss, elbos) and not isinstance(loss, TraceTailAdaptive_ELBO)


def make_losses(losses: Losses) -> Dict[str, ELBO]:
    """
    Losses by the names under which they are shown, made from names, ELBO instances or a dict of
    either. Instances are copied, so that what a loss learns stays with the copy.

    :raises ValueError: If a name is unknown or occurs twice.
    :raises TypeError: If a value is neither a name nor an ELBO.

    **Example**

    >>> list(make_losses(["STLTrace_ELBO:1.0", Trace_ELBO(num_particles=4)]))
    ['STLTrace_ELBO:1.0', 'Trace_ELBO:num_particles=4']
    """
    items: List[Tuple[str, Any]]
    if isinstance(losses, Mapping):
        items = list(losses.items())
    else:
        if isinstance(losses, (str, ELBO)) or inspect.isclass(losses):
            losses = [losses]
        items = [(loss_name(loss), loss) for loss in losses]
    made: Dict[str, ELBO] = {}
    for name, loss in items:
        if name in made:
            raise ValueError(
                f"two losses are called {name!r}; give a dict with a name for each"
            )
        found = made[name] = copy_loss(loss, "losses")
        if name == REFERENCE and (type(found) is not Trace_ELBO or found.num_particles != 1):
            raise ValueError(
                f"the name {REFERENCE!r} is kept for the reference, Trace_ELBO() with one "
                f"particle; give {type(found).__name__} another name"
            )
    return made


def usage(name: str, backend: Optional[str] = None) -> Optional[str]:
    """
    The line to write in a script for a loss that is given by name; None for a loss that is not of Pyro or pyro_rb.

    :param str backend: How its steps are compiled. Default: they are not.

    **Example**

    >>> print(usage("STLTrace_ELBO:num_particles=2"))
    from pyro_rb import STLTrace_ELBO; SVI(model, guide, optim, loss=STLTrace_ELBO(num_particles=2))
    >>> print(usage("STLTrace_ELBO", "inductor"))
    from pyro_rb import CompiledSVI, STLTrace_ELBO; CompiledSVI(model, guide, optim, loss=STLTrace_ELBO())
    """
    try:
        loss = make_loss(name)
    except ValueError:
        return None
    class_name = name.partition(":")[0]
    names, guide = [class_name], "guide"
    if isinstance(loss, ConfigEnumerate_ELBO):
        names, guide = ["TraceEnum_ELBO", "config_enumerate"], "config_enumerate(guide)"
    ours = [] if backend is None else ["CompiledSVI"] if backend == "inductor" else ["CompiledSVI", "compile"]
    if type(loss).__module__.startswith("pyro_rb.infer"):
        imports = f"from pyro_rb import {', '.join([*ours, *names])}"
    else:
        imports = f"from pyro.infer import {', '.join(names)}"
        imports += f"; from pyro_rb import {', '.join(ours)}" if ours else ""
    _, positional, keywords = _parse(name)
    given = [*map(_text, positional), *(f"{key}={_text(keywords[key])}" for key in keywords)]
    made = f"{names[0]}({', '.join(given)})"
    if "compile" in ours:
        made = f"compile({made}, {_text(backend)})"
    return f"{imports}; {'CompiledSVI' if ours else 'SVI'}(model, {guide}, optim, loss={made})"


def is_made_by(name: str, loss: ELBO) -> bool:
    """
    Whether :func:`make_loss` makes the same loss by a name, as far as its attributes tell.

    **Example**

    >>> is_made_by("Trace_ELBO", Trace_ELBO()), is_made_by("Trace_ELBO", Trace_ELBO(num_particles=4))
    (True, False)
    """
    try:
        made = make_loss(name)
    except ValueError:
        return False
    return type(made) is type(loss) and loss_name(made) == loss_name(loss)


def loss_name(loss: Any) -> str:
    """
    The name by which :func:`make_loss` makes the same loss, as far as its attributes tell.

    **Example**

    >>> loss_name(Trace_ELBO(num_particles=4, vectorize_particles=True))
    'Trace_ELBO:num_particles=4,vectorize_particles=True'
    """
    if not isinstance(loss, ELBO):
        return str(loss)
    if isinstance(loss, ConfigEnumerate_ELBO):
        return ENUMERATED
    options: Dict[str, Any] = {"strict_enumeration_warning": True}  # it says nothing of the estimator
    if hasattr(loss, "options"):
        usual = type(loss.options)()
        options.update(item for item in loss.options._asdict().items() if item not in usual._asdict().items())
    given: List[str] = []
    seen = set()
    own = _own_option(type(loss))
    # Between the loss and Pyro's are classes whose options it sets itself.
    classes = [c for c in type(loss).__mro__ if c is type(loss) or c.__module__.startswith("pyro.")]
    for cls in classes:
        for parameter in inspect.signature(cls).parameters.values() if issubclass(cls, ELBO) else ():
            name, default = parameter.name, parameter.default
            value = options.get(name, vars(loss).get(name, default))
            if name == "max_plate_nesting" and loss.vectorize_particles and loss.num_particles > 1:
                value -= 1  # to which Pyro has added the particles
            is_plain = isinstance(value, (bool, int, float, str, type(None)))
            if name not in seen and default is not parameter.empty and is_plain and value != default:
                is_short = name == own and not given and not isinstance(value, int)
                given.append(str(value) if is_short else f"{name}={value}")
            seen.add(name)
    return type(loss).__name__ + (":" if given else "") + ",".join(given)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
