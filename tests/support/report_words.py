# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""All that reports say in tests is explained by the page on how to read them."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "source" / "howto" / "report.rst"


def read_words():
    """Regular expressions for treatments, and for reasons."""
    treatments, reasons = PAGE.read_text(encoding="utf-8").split("\nReasons\n")
    return [_compile(part.partition("\nTreatments\n")[2] or part) for part in (treatments, reasons)]


def _compile(tables):
    rows = re.findall(r"^   \* - (.*?)^     - ", tables, re.M | re.S)
    words = [re.sub(r"\s+", " ", word) for row in rows for word in re.findall(r"``(.*?)``", row, re.S)]
    return re.compile("|".join(re.escape(word).replace(re.escape("..."), ".+") for word in words), re.S)


TREATMENTS, REASONS = read_words()


def find_unexplained(report):
    """Words of a report that the page does not have."""
    found = [row.treatment for row in report if not TREATMENTS.fullmatch(row.treatment)]
    for row in report:
        parts = [part for part in row.reason.split("; ") if part]
        # Some have a semicolon of their own.
        if not REASONS.fullmatch(row.reason) and not all(map(REASONS.fullmatch, parts)):
            found.append(row.reason)
    return found
