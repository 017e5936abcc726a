# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The command line, ``python -m pyro_rb``."""

import sys

from pyro_rb.diagnostics.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
