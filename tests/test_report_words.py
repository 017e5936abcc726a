# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The fixture ``explained_reports`` looks at each report of each test; here is what it would not let pass."""

import pytest

from pyro_rb.infer.report import Report, Row, SiteReport, Summary
from tests.support.report_words import find_unexplained


def test_words_of_the_page_pass():
    report = Report([SiteReport("z", "path gradient, c = 0.3", "linear: 3 rows, fan-in 6, cholesky; used twice")])
    assert find_unexplained(report) == []


@pytest.mark.parametrize(
    "treatment, reason, unexplained",
    [
        ("as Trace_ELBO", "magic", ["magic"]),
        ("as Trace_ELBO", "used twice; used thrice", ["used twice; used thrice"]),
        ("exactly", "used twice", ["exactly"]),
        ("exact", "3 of 3 values and more", ["3 of 3 values and more"]),
    ],
)
def test_other_words_do_not(treatment, reason, unexplained):
    assert find_unexplained([SiteReport("z", treatment, reason)]) == unexplained
    with pytest.raises(AssertionError, match="does not explain"):
        Summary([Row("z", treatment, reason)], {}).report()
