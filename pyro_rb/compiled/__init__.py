# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of SVI as one graph of tensor operations, without the Python around them."""

from pyro_rb.compiled.elbo import CompiledELBO, compile
from pyro_rb.compiled.svi import CompiledSVI

__all__ = ["CompiledELBO", "CompiledSVI", "compile"]
