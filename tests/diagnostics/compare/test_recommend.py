# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest

from pyro_rb.diagnostics.compare.recommend import progress_time, recommend
from pyro_rb.diagnostics.compare.report import LossResult, StateResult
from tests.diagnostics.compare.test_report import row


def state(*rows, step=0, noise_share=0.99, num_samples=300):
    reference = row(
        "Trace_ELBO", reference=True, bias_z=None, biased=None, steps_ratio=1.0, steps_ratio_error=0.0,
        time_ratio=1.0, time_ratio_error=0.0, memory_ratio=1.0,
    )
    return StateResult(step, [reference, *rows], num_samples, "num_samples", noise_share)


def good(name="Good_ELBO", **changes):
    values = dict(steps_ratio=0.3, steps_ratio_error=0.01, time_ratio=1.2, time_ratio_error=0.01, memory_ratio=1.1)
    return row(name, **{**values, **changes})


def test_time_for_progress():
    assert progress_time(good()) == pytest.approx((0.36, math.hypot(0.012, 0.003)), rel=1e-3)


def test_a_clear_case():
    found = recommend([state(good())])
    assert found.loss == "Good_ELBO"
    assert found.sentence == (
        "Take Good_ELBO: for the same progress it needs 0.36 +/- 0.012 times the time of Trace_ELBO. By its "
        "noise it needs 0.3 times the steps, and a step takes 1.2 times as long."
    )
    assert found.caveats[0].startswith("This was measured at the parameters as they are only.")
    assert found.progress_time["Trace_ELBO"] == pytest.approx(1.0)
    assert found.usage is None and "loss=STLTrace_ELBO())" in recommend([state(good("STLTrace_ELBO"))]).usage


def test_states_late_in_training_count_more():
    early = good(steps_ratio=10.0, steps_ratio_error=0.1)
    late = good(steps_ratio=0.1)
    found = recommend([state(early, noise_share=0.02), state(late, step=500)])
    assert found.loss == "Good_ELBO"
    assert "before training" in found.sentence and "after 500 training steps" in found.sentence
    assert "0.1 to 10 times the steps" in found.sentence
    assert not found.caveats
    # But a variance that would spoil the start is not forgiven.
    early = good(steps_ratio=10000.0, steps_ratio_error=10.0)
    assert recommend([state(early, noise_share=0.02), state(late, step=500)]).loss == "Trace_ELBO"


def test_biased_and_failed_losses_are_out_of_the_running():
    biased = good("Biased_ELBO", biased=True, steps_ratio=0.01)
    failed = LossResult("Bad_ELBO", error="no")
    found = recommend([state(biased, failed, good())])
    assert found.loss == "Good_ELBO" and set(found.progress_time) == {"Trace_ELBO", "Good_ELBO"}
    # Biased at one state is biased.
    found = recommend([state(good()), state(good(biased=True), step=5)])
    assert found.loss == "Trace_ELBO" and "no other loss that was measured applies" in found.sentence


def test_no_gain_worth_a_change():
    found = recommend([state(good(steps_ratio=0.8, steps_ratio_error=0.001))])
    assert found.loss == "Trace_ELBO"
    assert found.sentence.startswith("Stay with Trace_ELBO: for the same progress the best of the others, Good_ELBO")
    assert recommend([state(good(steps_ratio=3.0))]).loss == "Trace_ELBO"


def test_thin_evidence():
    found = recommend([state(good(steps_ratio=0.7, steps_ratio_error=0.3))])
    assert found.loss is None and not found.caveats
    assert "too thin" in found.sentence and "about 14000 of each" in found.sentence
    found = recommend([state(good(steps_ratio=0.8, steps_ratio_error=0.03))])
    assert found.loss is None and "Take more gradients, about " in found.sentence
    # The same error matters not where the gain is large, or there is surely none.
    assert recommend([state(good(steps_ratio=0.1, steps_ratio_error=0.2))]).loss == "Good_ELBO"
    assert recommend([state(good(steps_ratio=9.0, steps_ratio_error=2.0))]).loss == "Trace_ELBO"


@pytest.mark.parametrize("changes", [{"steps_ratio_error": math.nan}, {"steps_ratio": math.inf}])
def test_errors_that_are_not_known(changes):
    assert recommend([state(good(**changes))]).loss is None


def test_few_gradients():
    found = recommend([state(good()), state(good(), step=5, num_samples=20)])
    assert found.loss is None
    assert found.sentence == (
        "The evidence is too thin to recommend a loss: 20 gradients of each at a state. Take at least 300."
    )


def test_of_equals_the_simplest():
    same = [good("First_ELBO", steps_ratio=0.305), good("Second_ELBO", steps_ratio=0.3)]
    assert recommend([state(*same)]).loss == "First_ELBO"
    apart = [good("First_ELBO", steps_ratio=0.4), good("Second_ELBO", steps_ratio=0.3)]
    assert recommend([state(*apart)]).loss == "Second_ELBO"


def test_caveats():
    noisy = dict(detectable_bias=0.9, tail_share=0.4, memory_ratio=3.0)
    found = recommend([state(good(**noisy)), state(good(**noisy), step=5)]).caveats
    assert len(found) == 3
    assert "too few or too noisy to show a bias of Good_ELBO" in found[0]
    assert "Rare large gradients" in found[1]
    assert "3 times the memory" in found[2]
    # A bias belongs to the loss: one state that shows it is enough.
    mixed = recommend([state(good(detectable_bias=0.9)), state(good(detectable_bias=0.1), step=5)])
    assert not mixed.caveats


def test_reference_that_is_wrong():
    wrong = state(good())
    wrong.losses[0].biased = True
    found = recommend([wrong])
    assert found.loss is None and "Trace_ELBO itself disagrees" in found.sentence
