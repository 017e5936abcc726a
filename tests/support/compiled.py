# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Whether PyTorch is new enough for compiled steps."""

import pytest

from pyro_rb.compiled.torch_private import check_version

try:
    check_version()
except ImportError as error:
    WHY_NOT = str(error)
else:
    WHY_NOT = ""

needs_compiled = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
