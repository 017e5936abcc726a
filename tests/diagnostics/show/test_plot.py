# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import sys

import pytest

from pyro_rb.diagnostics.compare.report import LossResult, TrainingWindow
from pyro_rb.diagnostics.show.plot import KINDS, check_plot_path, plot_comparisons
from pyro_rb.diagnostics.show.views import SMALLEST
from tests.diagnostics.compare.test_report import make_comparison, row


def panels(figure):
    return [axes for part in figure.subfigs for axes in part.axes]


def points(axes):
    """Markers by their place."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor())
        for line in axes.lines
        if line.get_marker() not in ("None", "", "|", "_")
    ]


def test_points_and_panels():
    comparison = make_comparison(row("Good_ELBO"), row("Slow_ELBO", time_ratio=3.0), steps=(0, 4))
    figure = comparison.plot()
    found = panels(figure)
    assert [axes.get_title() for axes in found] == ["before training", "after 4 training steps"]
    for axes in found:
        assert [(x, y) for x, y, _ in points(axes)] == [(1.0, 1.0), (1.1, 0.5), (3.0, 0.5)]
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_xlim() == found[0].get_xlim()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["as efficient as the reference", "Trace_ELBO", "Good_ELBO", "Slow_ELBO"]


def test_lines_of_equal_efficiency():
    axes = panels(make_comparison(row("Good_ELBO")).plot())[0]
    lines = [line for line in axes.lines if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) == 2]
    products = []
    for line in lines:
        first, last = line.get_xdata() * line.get_ydata()
        assert first == pytest.approx(last)
        products.append(round(first, 9))
    assert 1.0 in products and 0.1 in products and 10.0 in products
    assert [line.get_linestyle() for line, p in zip(lines, products) if p == 1.0] == ["-"]


def test_biased_losses_are_hollow_and_failed_ones_absent():
    comparison = make_comparison(
        row("Biased_ELBO", biased=True),
        LossResult("Bad_ELBO", error="no"),
        row("Exact_ELBO", variance_ratio=0.0, variance_ratio_error=0.0),
    )
    figure = comparison.plot()
    found = points(panels(figure)[0])
    assert found[1][2] == "none" and found[0][2] != "none"
    assert found[2][1] == SMALLEST
    assert len(found) == 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "Biased_ELBO (biased)" in labels and "Bad_ELBO" not in labels


def test_several_comparisons_and_formats(tmp_path):
    short, long = make_comparison(row("A_ELBO")), make_comparison(row("B_ELBO"), steps=(0, 2, 4))
    for extension in ("png", "svg", "pdf"):
        path = tmp_path / f"figure.{extension}"
        figure = plot_comparisons([short, long], str(path))
        assert path.stat().st_size > 1000
    assert sum(axes.axison for axes in panels(figure)) == 4


def test_background_is_transparent(tmp_path):
    from PIL import Image

    path = tmp_path / "figure.png"
    make_comparison(row("A_ELBO")).plot(str(path))
    image = Image.open(path).convert("RGBA")
    assert image.getpixel((2, 2))[3] == 0


def test_no_pyplot_and_no_figure_left_open():
    make_comparison(row("A_ELBO")).plot()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_notebooks_show_it_without_pyplot():
    figure = make_comparison(row("A_ELBO")).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_race_needs_one():
    with pytest.raises(ValueError, match='"race" needs compare'):
        make_comparison(row("Good_ELBO")).plot(kind="race")


def test_kinds(tmp_path):
    comparison = make_comparison(row("Good_ELBO"), row("Biased_ELBO", biased=True), steps=(0, 4, 9))
    comparison.training = [TrainingWindow(3, 3, 3.5, 0.2), TrainingWindow(6, 3, 3.0, 0.1)]
    found = {kind: panels(comparison.plot(str(tmp_path / f"{kind}.svg"), kind)) for kind in KINDS if kind != "race"}
    assert {kind: len(axes) for kind, axes in found.items()} == {
        "efficiency": 3, "parameters": 3, "training": 2, "elbo": 1
    }
    assert [label.get_text() for label in found["parameters"][0].get_yticklabels()] == ["loc", "scale", "tail"]
    variances = [line.get_xdata() for line in found["parameters"][0].lines if len(line.get_xdata()) == 3]
    assert variances[0] == pytest.approx([1.4, 0.594, 0.006])
    ratios = found["training"][0].lines
    assert any(list(line.get_xdata()) == [0, 4, 9] and list(line.get_ydata()) == [0.5] * 3 for line in ratios)
    products = found["training"][1].lines
    assert any(list(line.get_ydata()) == pytest.approx([0.55] * 3) for line in products)
    curve = found["elbo"][0].lines[0]
    assert list(curve.get_xdata()) == [2.0, 5.0] and list(curve.get_ydata()) == [3.5, 3.0]
    with pytest.raises(ValueError, match="kind: expected one of efficiency, .*, elbo, race, got 'pie'"):
        comparison.plot(kind="pie")


def test_many_parameters():
    comparison = make_comparison(row("Good_ELBO"))
    shares = {f"p{i}": 2.0 ** -(i + 1) for i in range(20)}
    comparison.parameters = {name: [] for name in shares}
    for result in comparison.states[0].losses:
        result.variance_shares = shares
    (axes,) = panels(comparison.plot(kind="parameters"))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"p{i}" for i in range(12)] + ["8 others"]


def test_loss_without_training():
    (axes,) = panels(make_comparison(row("Good_ELBO")).plot(kind="elbo"))
    assert axes.get_ylim()[0] < 3.0 < axes.get_ylim()[1]


def test_unknown_extension():
    with pytest.raises(ValueError, match="cannot plot to 'a.doc': the extension is 'doc', expected one of .*png"):
        check_plot_path("a.doc")


def test_missing_matplotlib(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "pyro_rb\[plot\]"'):
        make_comparison(row("A_ELBO")).plot()
