# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro.infer
import pytest

from pyro_rb.diagnostics.compare.recommend import recommend
from pyro_rb.diagnostics.compare.report import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.run.losses import is_made_by, make_loss
from tests.diagnostics.compare.test_report import row


def state(*rows, step=1000, noise_share=0.99, num_samples=300):
    reference = row(
        "Trace_ELBO", reference=True, bias_z=None, biased=None, steps_ratio=1.0, steps_ratio_error=0.0,
        time_ratio=1.0, time_ratio_error=0.0, memory_ratio=1.0,
    )
    return StateResult(step, [reference, *rows], num_samples, "num_samples", noise_share)


def good(name="Good_ELBO", **changes):
    values = dict(steps_ratio=0.3, steps_ratio_error=0.01, time_ratio=1.2, time_ratio_error=0.01, memory_ratio=1.1)
    return row(name, **{**values, **changes})


def test_a_clear_case():
    found = recommend([state(good())])
    assert found.loss == "Good_ELBO"
    assert found.sentence == (
        "Take Good_ELBO: near the optimum it is expected to need 0.36 +/- 0.01 times the time of Trace_ELBO for "
        "the same precision. Its noise asks for 0.3 times the steps, and a step takes 1.2 times as long."
    )
    assert str(found) == found.sentence and not found.caveats
    assert found.progress_time == pytest.approx({"Good_ELBO": 0.36, "Trace_ELBO": 1.0})
    assert found.progress_time_error["Good_ELBO"] == pytest.approx(math.hypot(0.012, 0.003), rel=1e-3)
    assert found.usage is None and "loss=STLTrace_ELBO())" in recommend([state(good("STLTrace_ELBO"))]).usage


def test_ranking():
    found = recommend([state(good("B_ELBO", steps_ratio=0.5), good(), step=0), state(good("B_ELBO"), good())]).ranking
    assert [one.name for one in found] == ["Good_ELBO", "B_ELBO", "Trace_ELBO"]
    assert found[0].difference == 0.0 and found[0].by_state == pytest.approx([0.36, 0.36])
    assert found[1].difference == pytest.approx(found[1].time - found[0].time) and found[1].difference_error > 0
    assert found[2].difference_error == pytest.approx(found[0].error)


def test_the_error_of_a_difference_is_paired():
    """Blocks of draws that are good for one loss are good for the other."""
    blocks = [0.03, -0.04]
    other = good("B_ELBO", steps_ratio=0.5, steps_ratio_error=0.05, steps_ratio_blocks=blocks, time_ratio_error=0.0)
    one = good(steps_ratio_error=0.05, steps_ratio_blocks=blocks, time_ratio_error=0.0)
    reference = state(other, one)
    reference.losses[0].steps_ratio_blocks = [0.0, 0.0]
    found = recommend([reference]).ranking
    assert found[1].error == pytest.approx(0.06)
    assert found[1].difference_error == pytest.approx(0.0, abs=1e-12)
    assert found[2].difference_error == pytest.approx(0.06)


def test_no_advice_from_before_training():
    found = recommend([state(good(), step=0)])
    assert found.loss is None and "at one state only, before training" in found.sentence
    assert found.ranking[0].name == "Good_ELBO"


def test_states_late_in_training_count_more():
    early = good(steps_ratio=2.0, steps_ratio_error=0.1)
    late = good(steps_ratio=0.1)
    found = recommend([state(early, noise_share=0.02, step=0), state(late, step=500)])
    assert found.loss == "Good_ELBO"
    assert "0.1 to 2 times the steps" in found.sentence
    assert not found.caveats
    # What is bad at the start is not for a start.
    early = good(steps_ratio=10.0, steps_ratio_error=0.1)
    found = recommend([state(early, noise_share=0.02, step=0), state(late, step=500)])
    assert found.loss == "Trace_ELBO"
    assert "Good_ELBO is better still near the optimum" not in str(found)  # there is no other to begin with
    other = good("Other_ELBO", steps_ratio=0.5)
    found = recommend([state(early, other, noise_share=0.02, step=0), state(late, other, step=500)])
    assert found.loss == "Other_ELBO"
    assert found.caveats == [
        "Good_ELBO is better still near the optimum (0.12), but not to begin with (12 times the time before training)."
    ]
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
    assert found.sentence.startswith("Stay with Trace_ELBO: for the same precision the best of the others, Good_ELBO")
    assert recommend([state(good(steps_ratio=3.0))]).loss == "Trace_ELBO"


def test_thin_evidence():
    found = recommend([state(good(steps_ratio=0.7, steps_ratio_error=0.3))])
    assert found.loss is None and not found.caveats
    assert found.sentence.startswith("No advice yet: ") and "about 14000 of each" in found.sentence
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
        "No advice: 20 gradients of each loss at a state are too few. Take at least 300."
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


def comparison_of(*states, **others):
    return Comparison("a title", list(states), {}, {"steps": 0}, [], **others)


def test_no_line_of_code_for_a_loss_of_another_name():
    """It would make another loss."""
    states = [state(good("STLTrace_ELBO"))]
    assert comparison_of(*states).recommendation.usage is not None
    found = comparison_of(*states, own=["STLTrace_ELBO"]).recommendation
    assert found.loss == "STLTrace_ELBO" and found.usage is None


def test_names_that_make_the_loss():
    """However it is spelled; not those of another type or with other options."""
    losses = ["RaoBlackwell_ELBO", "R2G2_ELBO:pre_activations=auto", "DReG_ELBO:8", "STLTrace_ELBO:1.0"]
    assert all(is_made_by(name, make_loss(name)) for name in losses)

    class Trace_ELBO(pyro.infer.Trace_ELBO):
        pass

    assert not is_made_by("Trace_ELBO", Trace_ELBO()) and not is_made_by("mine", pyro.infer.Trace_ELBO())
    assert not is_made_by("STLTrace_ELBO", make_loss("STLTrace_ELBO:1.0"))


def test_why_nothing_was_trained():
    start = state(good(), step=0)
    assert str(comparison_of(start).recommendation).endswith("Leave train_steps out, or say how far to train.")
    failed = comparison_of(start, error="training failed").recommendation
    assert failed.sentence.endswith("more along it. Training failed.")
