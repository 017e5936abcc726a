# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a :class:`~pyro_rb.diagnostics.compare.report.Comparison` is shown by."""

from pyro_rb.diagnostics.show.page import page, section
from pyro_rb.diagnostics.show.plot import plot_comparisons as plot
from pyro_rb.diagnostics.show.table import table, text

__all__ = ["page", "plot", "section", "table", "text"]
