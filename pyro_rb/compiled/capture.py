# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A loss and its gradient as one graph of tensor operations.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import pyro
import torch

from pyro_rb.compiled.operations import Operations
from pyro_rb.compiled.simplify import simplify
from pyro_rb.compiled.torch_private import has_hooks, memory, trace
from pyro_rb.compiled.watch import Assumptions, NotCapturable, Watch


class Captured(NamedTuple):
    """
    A graph of tensor operations, with the tensors that it uses by reference.

    Its inputs are the tensors among the arguments of a step, and ``fixed``. It returns the
    loss, whether all that was assumed held (None if nothing was), the gradients of
    ``parameters``, and what else was asked for.
    """

    module: torch.fx.GraphModule
    fixed: List[torch.Tensor]
    parameters: List[torch.Tensor]
    #: Tensors of others that it changes in place, such as running means.
    changed: List[torch.Tensor]
    #: Where it looks at values that it takes for granted.
    places: List[str]


def capture(
    loss_and_grads: Callable[..., Any],
    args: Sequence[torch.Tensor],
    extra: List[torch.Tensor],
) -> Captured:
    """
    :param loss_and_grads: returns a loss, and adds to the ``.grad`` of leaf tensors, from the
        tensors among the arguments of the step.
    :param args: these tensors.
    :param extra: to which it adds what else is to be returned.
    :raises NotCapturable: saying why.
    """
    assumptions = Assumptions()
    watch, operations = Watch(assumptions), Operations(assumptions)
    parameters: List[torch.Tensor] = []

    def run(*inputs: torch.Tensor) -> Tuple[Any, ...]:
        with pyro.validation_enabled(False), watch, operations:
            loss = loss_and_grads(*inputs)
            loss = loss if isinstance(loss, torch.Tensor) else torch.as_tensor(loss)
            loss = loss.detach().clone()
            operations.check_generators()
            conditions = assumptions.conditions
            held = torch.stack(conditions).all() if conditions else None
        leaves = [x for x, _ in operations.leaves.values()]
        parameters.extend(x for x in leaves if x.grad is not None)
        grads: Any = [x.grad for x in parameters]
        if any(grad.is_sparse for grad in grads):
            raise NotCapturable("A gradient is sparse, as of an Embedding. Expected sparse=False")
        return (loss, held, *grads, *extra)

    try:
        # Tensors of their own, so that one that is passed twice is told apart.
        inputs = [x.detach() for x in args]
        operations.given.update(map(memory, inputs))
        module = trace(run, inputs)
    except NotCapturable:
        raise
    except Exception as e:
        raise NotCapturable(f"{type(e).__name__}: {e}") from e
    finally:
        for x, grad in operations.leaves.values():
            x.grad = grad
        with torch.no_grad():
            for x, value in operations.changed.values():
                x.copy_(value)
    if any(str(node.target).startswith("aten.mkldnn_rnn_layer") for node in module.graph.nodes):
        raise NotCapturable(
            "oneDNN runs an LSTM, which keeps what its backward pass needs only where autograd looks on. Expected "
            "torch.backends.mkldnn.enabled = False, for the LSTM without oneDNN"
        )
    if any(map(has_hooks, parameters)):
        raise NotCapturable("A parameter has hooks, which a graph does not call")
    fixed = _lift(module)
    simplify(module)
    changed = [x for x, _ in operations.changed.values()]
    return Captured(module, fixed, parameters, changed, assumptions.places)


def _lift(module: torch.fx.GraphModule) -> List[torch.Tensor]:
    """
    Turns the tensors that the graph refers to into further inputs, and returns them.
    Numbers in the code, which nobody can change, stay.
    """
    graph = module.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    found: Dict[int, Tuple[Any, torch.Tensor]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        users = {user.target for user in node.users}
        if users == {torch.ops.aten.lift_fresh_copy.default}:
            continue
        tensor = getattr(module, node.target)
        if not isinstance(tensor, torch.Tensor):
            raise NotCapturable(f"It uses a {type(tensor).__name__} in an operation")
        if id(tensor) not in found:
            with _after(graph, places):
                place = graph.placeholder(f"fixed_{len(found)}")
            places.append(place)
            found[id(tensor)] = place, tensor
        node.replace_all_uses_with(found[id(tensor)][0])
        graph.erase_node(node)
    module.recompile()
    return [tensor for _, tensor in found.values()]


def _after(graph: torch.fx.Graph, places: Sequence[Any]) -> Any:
    if places:
        return graph.inserting_after(places[-1])
    return graph.inserting_before(next(iter(graph.nodes)))
