# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from tests.infer.topk.models import ENUMERABLE
from tests.support.elbo_contract import ELBOContract, assert_same, evaluate
from tests.support.models import conj

pytestmark = pytest.mark.slow


class TestTopKContract(ELBOContract):
    def make_elbo(self, **kwargs: Any) -> RaoBlackwellTopK_ELBO:
        # Trace_ELBO spends no draws on a guess, so that none may be spent here.
        kwargs.setdefault("max_plate_nesting", 1)
        return RaoBlackwellTopK_ELBO(**kwargs)

    def test_plate_nesting_is_guessed(self, dtype):
        case, losses = conj(), []
        for elbo in (RaoBlackwellTopK_ELBO, TraceEnum_ELBO):
            elbo = elbo(num_particles=3, vectorize_particles=True, strict_enumeration_warning=False)
            losses.append(evaluate(elbo, case, seed=0)[0])
            assert elbo.max_plate_nesting == 2
        assert_same(*map(torch.tensor, losses))


@pytest.mark.parametrize("baseline", [None, "loo", "reinforce+"])
def test_two_discrete_models_share_one_object(baseline):
    torch.set_default_dtype(torch.float64)
    options = {"baseline": baseline, "max_plate_nesting": 2}
    shared, own = RaoBlackwellTopK_ELBO(**options), [RaoBlackwellTopK_ELBO(**options) for _ in range(2)]
    cases = [ENUMERABLE["mixture"](), ENUMERABLE["nested_plates"]()]
    for seed in range(3):
        for elbo, case in zip(own, cases):
            pyro.set_rng_seed(seed)
            assert_same(evaluate(shared, case, seed=seed), evaluate(elbo, case, seed=seed))
