# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The estimators of other papers that an example compares to are what they are said to be."""

import sys
from pathlib import Path

import pytest
import torch

from tests.support.common import assert_unbiased

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COSTS = torch.tensor([3.0, -1.0, 0.5, 8.0])


@pytest.fixture
def other_estimators(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    from support import other_estimators

    yield other_estimators
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("models", "support"):
            del sys.modules[name]


@pytest.mark.parametrize("control", [lambda z: z.sin().sum(-1), lambda z: 3.0 * (z.softmax(-1) @ COSTS)])
def test_relax_is_unbiased(other_estimators, control):
    logits = torch.tensor([0.3, -0.5, 1.0, -1.5])
    p = logits.softmax(-1)
    exact = p * (COSTS - p @ COSTS)
    _, _, gradient, _ = other_estimators.relax_gradient(logits.expand(100_000, -1), COSTS.__getitem__, control)
    assert_unbiased(gradient, exact)


def test_relax_has_less_noise_by_a_good_control_variate(other_estimators):
    logits = torch.tensor([0.3, -0.5, 1.0, -1.5]).expand(20_000, -1)

    def noise(scale):
        def control(z):
            return scale * ((z / 0.5).softmax(-1) @ COSTS)

        return other_estimators.relax_gradient(logits, COSTS.__getitem__, control)[3]

    assert noise(1.0) < 0.7 * noise(0.0)


def test_labels_are_draws(other_estimators):
    logits = torch.tensor([0.3, -0.5, 1.0, -1.5])
    found = other_estimators.relax_gradient(logits.expand(100_000, -1), COSTS.__getitem__, lambda z: z.sum(-1))
    label, cost, _, _ = found
    shares = torch.bincount(label) / len(label)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.01)
    assert torch.equal(cost, COSTS[label])
