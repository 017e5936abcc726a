# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.infer.stl_elbo import STLTrace_ELBO

__all__ = ["STLTrace_ELBO"]
