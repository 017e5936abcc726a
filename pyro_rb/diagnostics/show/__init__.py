# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Results as text, pages and figures. matplotlib is imported when the first figure is drawn.

Results know nothing of this floor; it gives comparisons their ``view``.
"""

from types import SimpleNamespace

from pyro_rb.diagnostics.compare.report import Comparison
from pyro_rb.diagnostics.show import page, plot, table

Comparison.view = SimpleNamespace(
    page=page.page, plot=plot.plot_comparisons, section=page.section, table=table.table, text=table.text
)
