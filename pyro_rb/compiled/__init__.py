# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of SVI as one graph of tensor operations, without the Python around them."""

from pyro_rb.compiled.elbo import CompiledELBO, compile

__all__ = ["CompiledELBO", "compile"]
