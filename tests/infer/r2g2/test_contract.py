# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pytest
from pyro.infer import TraceMeanField_ELBO

from pyro_rb.infer import R2G2_ELBO
from tests.support.elbo_contract import ELBOContract

pytestmark = pytest.mark.slow


class TestR2G2Contract(ELBOContract):
    def make_elbo(self, **kwargs: Any) -> R2G2_ELBO:
        return R2G2_ELBO(**kwargs)

    # The loss has analytic KL terms, which Trace_ELBO has not.

    def test_arguments_reach_model_and_guide(self, dtype):
        self.reference = TraceMeanField_ELBO
        super().test_arguments_reach_model_and_guide(dtype)

    def test_plate_nesting_is_guessed(self, dtype):
        self.reference = TraceMeanField_ELBO
        super().test_plate_nesting_is_guessed(dtype)
