# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The class of all figures here. Importing it imports matplotlib."""

import io
import warnings
from typing import Any

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """Notebooks show it, also where matplotlib.pyplot was not used before and knows of no notebook."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # A letter that the font lacks is a box, not an error.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            super().savefig(*args, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
