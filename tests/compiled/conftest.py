# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Where PyTorch is too old for compiled steps, the rest of the package is tested."""

from tests.support.compiled import WHY_NOT

if WHY_NOT:
    collect_ignore_glob = ["test_*.py"]
