# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import List, NamedTuple

from tabulate import tabulate


class SiteReport(NamedTuple):
    """What an estimator did with one latent site of the guide, and why."""

    site: str
    treatment: str
    reason: str


class Report(List[SiteReport]):
    """
    A list of :class:`SiteReport` that prints as a table, and shows as one in notebooks.

    >>> print(Report([SiteReport("z", "path gradient", "reparameterised draw")]))
    site    treatment      reason
    ------  -------------  --------------------
    z       path gradient  reparameterised draw
    """

    def __str__(self) -> str:
        return tabulate(self, headers=SiteReport._fields)

    def _repr_html_(self) -> str:
        """The table as notebooks show it."""
        return tabulate(self, headers=SiteReport._fields, tablefmt="html")
