# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Results as text, pages and figures. matplotlib is imported when the first figure is drawn.

Results know nothing of this floor; it gives comparisons their ``view``.
"""

from pyro_rb.diagnostics.compare.report import Comparison
from pyro_rb.diagnostics.show import view

Comparison.view = view
