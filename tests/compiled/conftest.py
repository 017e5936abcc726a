# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Steps are compiled with the versions of PyTorch with which that was tried; the rest of the package needs none of it."""

from pyro_rb.compiled.torch_private import check_version

try:
    check_version()
except ImportError:
    collect_ignore_glob = ["test_*.py"]
