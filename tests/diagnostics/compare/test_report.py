# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import pytest

from pyro_rb.diagnostics import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.show.table import LEGEND


def row(name, **changes):
    values = dict(
        bias_z=1.25,
        bias_at="net$$$loc[3]",
        bias_size=0.01,
        bias_threshold=4.2,
        biased=False,
        detectable_bias=0.034,
        variance=2.0,
        variance_ratio=0.5,
        variance_ratio_error=0.042,
        variance_shares={"net$$$loc": 0.7, "net$$$scale": 0.297, "net$$$tail": 0.003},
        seconds=2e-3,
        time_ratio=1.1,
        time_ratio_error=0.001,
        cost_ratio=0.55,
        loss=3.0,
        loss_error=0.1,
        loss_deviation=0.3,
        steps_ratio=0.5,
        steps_ratio_error=0.05,
        memory=3000,
        memory_ratio=1.5,
    )
    return LossResult(name, **{**values, **changes})


def make_comparison(*rows, notes=(), steps=(0,)):
    reference = row("Trace_ELBO", reference=True, bias_z=None, biased=None, variance_ratio=1.0,
                    time_ratio=1.0, cost_ratio=1.0, steps_ratio=1.0, steps_ratio_error=0.0,
                    memory=2000, memory_ratio=1.0)
    return Comparison(
        title="A title",
        states=[StateResult(step, [reference, *rows], num_samples=10) for step in steps],
        parameters={"net$$$loc": [3, 2], "net$$$scale": [], "net$$$tail": []},
        settings={"num_samples": 10, "seed": 0, "device": "cpu", "optim": "Adam({'lr': 0.1})",
                  "bias_threshold": 4.2, "reference_gradient": "Trace_ELBO, with the same random numbers"},
        notes=list(notes),
    )


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "130")


def test_narrow_terminal(monkeypatch):
    last = "most variance in"
    hidden = {60: f"|z|, bias seen from, memory, {last}", 80: f"memory, {last}", 100: last}
    for columns, names in hidden.items():
        monkeypatch.setenv("COLUMNS", str(columns))
        table = make_comparison(row("Good_ELBO"), steps=(0, 5)).table()
        assert max(map(len, table.splitlines())) <= columns
        assert "0.50 +/- 0.04" in table and "Ranking" in table
        assert f"A wider terminal also shows: {names}." in " ".join(table.split())
    assert "at step 5" in table and "at step 5." not in table


def line_of(comparison, name):
    return next(line for line in str(comparison).splitlines() if line.startswith(name + "  "))


def test_table():
    text = str(make_comparison(row("Good_ELBO"), notes=["take care"]))
    lines = text.splitlines()
    assert lines[0] == "A title"
    assert lines[1].startswith("8 parameter values, 10 gradients of each loss, seed 0, device cpu")
    assert lines[2] == "biased means |z| > 4.2 against Trace_ELBO, with the same random numbers"
    assert (
        "At the parameters as they are: loss 3 +/- 0.1 nats, 2 ms a step with Trace_ELBO; noise makes up 100% of the "
        "mean square of its gradient"
    ) in " ".join(text.split())
    assert "Best variance x time: Good_ELBO, 0.55." in lines
    assert "Note: take care" in lines
    assert text.endswith(LEGEND)
    assert max(map(len, lines)) <= 130


def test_row():
    cells = line_of(make_comparison(row("Good_ELBO")), "Good_ELBO").split("  ")
    cells = [cell.strip() for cell in cells if cell.strip()]
    assert cells == [
        "Good_ELBO", "0.50 +/- 0.04", "1.10 +/- 0.01", "0.55", "1.2", "3.4%", "1.50", "loc 70%, scale 30%",
    ]


def test_marks():
    comparison = make_comparison(
        row("Biased_ELBO", bias_z=math.inf, biased=True, cost_ratio=0.01),
        row("Weak_ELBO", detectable_bias=1.5),
    )
    assert ">999 !" in line_of(comparison, "Biased_ELBO")
    assert "1.2 ?" in line_of(comparison, "Weak_ELBO") and "150%" in line_of(comparison, "Weak_ELBO")
    text = str(comparison)
    assert "Biased_ELBO is biased, or has another objective: its mean gradient differs at net$$$loc[3]" in text
    assert "Best variance x time: Weak_ELBO" in text  # never a biased loss


def test_heavy_tails():
    assert "largest 1%" not in str(make_comparison(row("Good_ELBO", tail_share=0.1)))
    text = " ".join(str(make_comparison(row("Good_ELBO", tail_share=0.43))).split())
    assert "the largest 1% make up 43% of that of Good_ELBO" in text


def test_failed_row():
    failed = LossResult("Bad_ELBO", error="ValueError: no")
    text = str(make_comparison(failed))
    assert "Bad_ELBO could not be measured: ValueError: no" in text
    assert "not measured" in text


def test_states_are_named():
    text = str(make_comparison(row("Good_ELBO"), steps=(0, 5, 10)))
    assert "Before training: " in text
    assert "After 5 training steps: " in text and "After 10 training steps: " in text
    assert "trained with Trace_ELBO and Adam({'lr': 0.1})" in text


@pytest.mark.parametrize(
    "ratio, error, expected",
    [
        (1222.4, 37.2, "1222 +/- 37"),
        (29.83, 0.24, "29.8 +/- 0.2"),
        (0.0123, 0.00045, "0.012 +/- 0.0004"),
        (0.0, 0.0, "0 +/- 0"),
        (math.inf, math.nan, "inf"),
        (1.02, 0.0001, "1.02 +/- 0.01"),
    ],
)
def test_ratios(ratio, error, expected):
    assert f"  {expected}  " in line_of(
        make_comparison(row("Good_ELBO", variance_ratio=ratio, variance_ratio_error=error)), "Good_ELBO"
    )


def test_no_variance():
    assert "none: it has no noise" in line_of(make_comparison(row("Good_ELBO", variance_shares={})), "Good_ELBO")
    many = {f"w{i}": 1 / 400 for i in range(400)}
    assert line_of(make_comparison(row("Good_ELBO", variance_shares=many)), "Good_ELBO").endswith("400 alike")
    plain = {"loc": 0.7, "scale": 0.3}
    assert line_of(make_comparison(row("Good_ELBO", variance_shares=plain)), "Good_ELBO").endswith(
        "loc 70%, scale 30%"
    )
    mixed = {"a.loc": 0.7, "scale": 0.3}
    assert line_of(make_comparison(row("Good_ELBO", variance_shares=mixed)), "Good_ELBO").endswith(
        "a.loc 70%, scale 30%"
    )
    one = line_of(make_comparison(row("Good_ELBO", variance_shares={"a.b": 1.0})), "Good_ELBO")
    assert one.endswith("b 100%")


def test_to_dict_is_json():
    comparison = make_comparison(row("Good_ELBO", bias_z=math.inf, detectable_bias=math.nan))
    result = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert result["parameters"] == {"net$$$loc": [3, 2], "net$$$scale": [], "net$$$tail": []}
    good = result["states"][0]["losses"][1]
    assert good["name"] == "Good_ELBO" and good["variance_ratio"] == 0.5
    assert good["bias_z"] is None and good["detectable_bias"] is None
