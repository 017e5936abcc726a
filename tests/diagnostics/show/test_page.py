# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import sys
from html.parser import HTMLParser

import pytest

from pyro_rb.diagnostics.compare.report import LossResult, TrainingWindow
from pyro_rb.diagnostics.show.page import page
from pyro_rb.infer.report import Report, SiteReport
from tests.diagnostics.compare.test_report import make_comparison, row

VOID = {"meta", "br", "img", "path", "use", "image"}


class Checker(HTMLParser):
    """Tags must be closed in order; gathers what the page refers to and its cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.cells, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_page_stands_alone():
    comparison = make_comparison(row("Good_ELBO"), notes=["x < y & z"], steps=(0, 4))
    comparison.training = [TrainingWindow(2, 2, 3.5, 0.2), TrainingWindow(4, 2, 3.0, 0.1)]
    text = comparison.to_html()
    found = Checker(text)
    assert text.startswith("<!DOCTYPE html>")
    assert all(link.startswith("#") for link in found.links)  # within the figures
    assert found.tags.count("table") == 3 and found.tags.count("svg") == 4
    assert "Good_ELBO" in found.cells and "0.50 +/- 0.04" in found.cells
    assert "x &lt; y &amp; z" in text
    assert 'content="light dark"' in text
    assert "variance         of the gradient" in text


def test_advice():
    text = make_comparison(row("Good_ELBO"))._repr_html_()
    assert '<p class="advice thin">No advice: 10 gradients' in text  # ten gradients
    rows = [row("Good_ELBO"), row("Bad_ELBO", biased=True), LossResult("No_ELBO", error="<no>")]
    comparison = make_comparison(*rows, steps=(9,))
    comparison.states[0].num_samples = 100
    text = comparison._repr_html_()
    assert '<p class="advice">Take Good_ELBO' in text
    assert '<tr class="best"><td>Good_ELBO</td>' in text
    assert '<tr class="out"><td>Bad_ELBO</td>' in text and '<tr class="out"><td>No_ELBO</td>' in text
    assert "could not be measured: &lt;no&gt;" in text
    Checker(text)


def test_several_comparisons_on_a_page():
    found = Checker(page([make_comparison(row("A_ELBO")), make_comparison(row("B_ELBO"))]))
    assert found.tags.count("h2") == 2 and found.tags.count("html") == 1


def test_without_matplotlib(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Checker(make_comparison(row("A_ELBO")).to_html())
    assert "svg" not in found.tags and found.tags.count("table") == 2


@pytest.mark.parametrize("title", ["<b>", 'a "b" & c'])
def test_titles_are_escaped(title):
    comparison = make_comparison(row("A_ELBO"))
    comparison.title = title
    assert "b" not in Checker(comparison.to_html()).tags


def test_report_of_sites():
    text = Report([SiteReport("z<1>", "top-k", "4 of 50 values")])._repr_html_()
    found = Checker(text)
    assert [cell.strip() for cell in found.cells] == ["z<1>", "top-k", "4 of 50 values"]
