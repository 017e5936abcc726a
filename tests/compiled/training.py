# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of SVI with a loss and with the same loss compiled, and what must be equal."""

from typing import Any, Callable, Dict, List, Tuple

import pyro
import torch
from pyro.infer import SVI

import pyro_rb

Trained = Tuple[List[float], Dict[str, torch.Tensor], torch.Tensor]


def train(loss: Any, make: Callable[[], Any], num_steps: int = 12, seed: int = 0) -> Trained:
    """Losses, parameters and the next random numbers after some steps.

    :param make: returns model, guide, a function from the step to its arguments, and an optimizer if it is not Adam.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide, args, *optim = make()
    svi = SVI(model, guide, *(optim or [pyro.optim.Adam({"lr": 0.02})]), loss)
    losses = [svi.step(*args(i)) for i in range(num_steps)]
    store = {k: p.detach().clone() for k, p in pyro.get_param_store().named_parameters()}
    for name, fn in (("model", model), ("guide", guide)):
        for key, b in getattr(fn, "named_buffers", dict().items)():
            store[f"{name}.{key}"] = b.clone()
    return losses, store, torch.rand(4)


def assert_equal(actual: Trained, expected: Trained) -> None:
    """Bit by bit."""
    assert actual[0] == expected[0]
    assert list(actual[1]) == list(expected[1])
    for name, value in expected[1].items():
        assert torch.equal(actual[1][name], value), name
    assert torch.equal(actual[2], expected[2])


def assert_replayed(
    make_loss: Callable[[], Any],
    make: Callable[[], Any],
    num_steps: int = 12,
    num_graphs: int = 1,
    **options: Any,
) -> Any:
    """The compiled loss is replayed, and does what the eager loss does."""
    expected = train(make_loss(), make, num_steps)
    loss = pyro_rb.compile(make_loss(), "replay", **options)
    assert_equal(train(loss, make, num_steps), expected)
    assert loss.num_graphs == num_graphs
    return loss
