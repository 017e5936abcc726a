# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict, Sequence, Tuple

import pyro
import torch
from torch.nn.parallel import DistributedDataParallel

from pyro_rb.compiled.call import with_tensors
from pyro_rb.compiled.capture import capture
from pyro_rb.compiled.graph import Graph
from pyro_rb.compiled.reach import Reachable
from pyro_rb.compiled.settle import Learning
from pyro_rb.compiled.state import Contents, State
from pyro_rb.compiled.watch import NotCapturable
from pyro_rb.infer import RVRSGuide
from pyro_rb.infer.util import parameter_table, set_parameter_table, without_handlers


def make_graph(
    elbo: Any,
    model: Any,
    guide: Any,
    reach: Reachable,
    call: Tuple[Tuple, Dict[str, Any]],
    tensors: Sequence[torch.Tensor],
    learns: bool,
) -> Graph:
    """
    Captures a step of a loss. What the step changes is put back.

    :param Reachable reach: what model, guide and loss reach.
    :param call: arguments of model and guide, positional ones and others.
    :param tensors: among these.
    :param bool learns: whether the loss learns a scale in this step.
    :raises NotCapturable: with the reason, and a remedy.
    """
    _refuse(reach)
    state, contents = State(reach.buffers()), Contents(reach.slots)
    table = dict(parameter_table())
    learning = Learning(elbo, learns)
    settled = learning.settle(elbo)

    def run(*inputs: torch.Tensor) -> Any:
        args, kwargs = with_tensors(call, iter(inputs))
        return settled.loss_and_grads(model, guide, *args, **kwargs)

    try:
        with without_handlers():
            captured = capture(run, tensors, learning.outputs)
    finally:
        contents.put_back()
        state.restore()
        set_parameter_table(table)
    return Graph(captured, reach, learning)


def _refuse(reach: Reachable) -> None:
    if pyro.settings.get("module_local_params"):
        remedy = "pyro.settings.set(module_local_params=False)"
        raise NotCapturable(f"Parameters are not in the param store. Expected {remedy}")
    for module in reach.modules:
        if isinstance(module, DistributedDataParallel):
            raise NotCapturable("DistributedDataParallel sums gradients while they are computed")
        if isinstance(module, RVRSGuide) and module.local_plate is not None:
            raise NotCapturable(
                f"RVRSGuide with local_plate={module.local_plate!r} proposes until enough is "
                "accepted for each item, in a number of rounds that depends on values"
            )
