# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import operator
from typing import Any, Callable, Dict, List

import torch

from pyro_rb.compiled.torch_private import bare


def as_function(module: torch.fx.GraphModule) -> Callable[..., Any]:
    """
    A Python function that calls the operations of a graph one after the other. It does what
    the module does, without its checks at each operation.

    >>> from torch.fx import symbolic_trace
    >>> as_function(symbolic_trace(lambda x, y: 2 * x + y))(3.0, 1.0)
    7.0
    """
    scope: Dict[str, Any] = {}
    lines: List[str] = []
    inputs: List[str] = []

    def render(value: Any) -> str:
        if isinstance(value, torch.fx.Node):
            return value.name
        if isinstance(value, (list, tuple)):
            return "[" + "".join(f"{render(item)}, " for item in value) + "]"
        return bind(value)

    def bind(value: Any) -> str:
        name = f"_constant_{len(scope)}"
        scope[name] = value
        return name

    last_use = {}
    for node in module.graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    for node in module.graph.nodes:
        args = ", ".join(map(render, node.args))
        if node.op == "placeholder":
            inputs.append(node.name)
        elif node.op == "get_attr":
            lines.append(f"{node.name} = {bind(getattr(module, node.target))}")
        elif node.op == "output":
            lines.append(f"return {render(node.args[0])}")
        elif node.target is operator.getitem:
            lines.append("{0} = {1}[{2}]".format(node.name, *map(render, node.args)))
        else:
            options = "".join(f", {k}={render(v)}" for k, v in node.kwargs.items())
            lines.append(f"{node.name} = {bind(bare(node.target))}({args}{options})")
        dead = [used.name for used in node.all_input_nodes if last_use[used] is node]
        if dead and node.op != "output":
            lines.append(" = ".join([*dead, "None"]))
    body = "".join(f"    {line}\n" for line in lines)
    exec(f"def run({', '.join(inputs)}):\n{body}", scope)
    run: Callable[..., Any] = scope["run"]
    return run
