# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Where PyTorch is too old for compiled steps, the rest of the package is tested."""

from pyro_rb.compiled.torch_private import check_version

try:
    check_version()
except ImportError:
    collect_ignore_glob = ["test_*.py"]
