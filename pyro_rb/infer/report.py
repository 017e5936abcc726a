# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, List, Mapping, NamedTuple

from tabulate import tabulate


class SiteReport(NamedTuple):
    """What an estimator did with one latent site of the guide, and why."""

    site: str
    treatment: str
    reason: str


class Report(List[SiteReport]):
    """
    A list of :class:`SiteReport` that prints as a table, and is shown as a table in notebooks.

    >>> print(Report([SiteReport("z", "path gradient", "reparameterized draw")]))
    site    treatment      reason
    ------  -------------  --------------------
    z       path gradient  reparameterized draw
    """

    def __str__(self) -> str:
        return tabulate(self, headers=SiteReport._fields)

    def _repr_html_(self) -> str:
        """The table as notebooks show it."""
        return tabulate(self, headers=SiteReport._fields, tablefmt="html")


class Row(NamedTuple):
    site: str
    #: None for a path gradient only; else anything that prints as the treatment.
    treatment: Any
    #: Anything that prints as the reason, by the time of the report.
    reason: Any


class Summary(NamedTuple):
    """What is kept of a particle for the report. Holds no graph."""

    rows: List[Row]
    #: Of the score of each site with a path gradient.
    scales: Mapping[str, float]

    def report(self, note: str = "") -> Report:
        """
        :param note: is added to the reasons of path gradients.
        """
        found = Report()
        for name, treatment, reason in self.rows:
            reason = str(reason)
            if name in self.scales:
                also = "" if treatment is None else f"{treatment} and "
                treatment = f"{also}path gradient, c = {self.scales[name]:.3g}"
                reason += note
            found.append(SiteReport(name, str(treatment), reason))
        return found
