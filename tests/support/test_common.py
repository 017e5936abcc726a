# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The statistical asserts must fail when they should."""

import pytest
import torch

from tests.support.common import assert_unbiased, assert_variance_ratio


def sample(shape=(2000, 3), mean=1.0, scale=1.0):
    return mean + scale * torch.randn(shape, dtype=torch.double)


def test_unbiased_passes():
    assert_unbiased(sample(), torch.ones(3), detect=0.2)
    assert_unbiased({"a": sample(), "b": sample((2000,))}, {"a": torch.ones(3), "b": torch.tensor(1.0)})
    assert_unbiased(sample(), independent=sample(), detect=0.2)
    noise = sample()
    assert_unbiased(noise, paired=noise + 1e-3 * torch.randn(2000, 3), detect=1e-3)


def test_bias_is_found():
    with pytest.raises(AssertionError, match=r"biased in samples\[1\]: z = "):
        assert_unbiased(sample() + torch.tensor([0.0, 0.2, 0.0]), torch.ones(3))
    with pytest.raises(AssertionError, match=r"biased in b\["):
        assert_unbiased({"a": sample(), "b": sample()}, {"a": torch.ones(3), "b": torch.ones(3) * 0.8})
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(sample(), independent=sample(mean=0.8))
    noise = sample()
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(noise, paired=noise + 0.01 + 1e-3 * torch.randn(2000, 3))


def test_want_of_power_is_found():
    with pytest.raises(AssertionError, match=r"too little power.*raise N from 50 to about"):
        assert_unbiased(sample((50, 3)), torch.ones(3))
    assert_unbiased(sample((50, 3)), torch.ones(3), detect=None)
    assert_unbiased(sample((50, 3)), torch.ones(3), scale=100.0)


def test_needed_number_of_draws_is_enough():
    with pytest.raises(AssertionError) as failure:
        assert_unbiased(sample((200, 3)), torch.ones(3), detect=0.1)
    needed = int(str(failure.value).split()[-1])
    assert_unbiased(sample((int(1.2 * needed), 3)), torch.ones(3), detect=0.1)


def test_zero_expectation_needs_a_scale():
    with pytest.raises(AssertionError, match="the expected gradient is zero.*give scale="):
        assert_unbiased(sample(mean=0.0), torch.zeros(3))
    assert_unbiased(sample(mean=0.0), torch.zeros(3), scale=3.0)


def test_other_misuse():
    with pytest.raises(TypeError, match="exactly one of expected, paired, independent"):
        assert_unbiased(sample())
    with pytest.raises(AssertionError, match=r"samples of \['a'\] cannot be compared with \['b'\]"):
        assert_unbiased({"a": sample()}, {"b": torch.ones(3)})
    with pytest.raises(AssertionError, match="the mean of samples is not finite"):
        assert_unbiased(torch.full((5, 1), float("nan")), torch.zeros(1))
    with pytest.raises(TypeError, match="give below=... or above=..."):
        assert_variance_ratio(sample(), sample())
    with pytest.raises(AssertionError, match="the second sample has no variance"):
        assert_variance_ratio(sample(), torch.ones(5, 3), below=1.0)


def test_projections_see_categories_that_were_never_drawn():
    # One-hot draws of 400 categories, of which most are never seen; two are confused.
    probs = torch.full((400,), 1e-5, dtype=torch.double)
    probs[0], probs[1] = 0.7, 1 - 0.7 - 398e-5
    draws = torch.nn.functional.one_hot(torch.multinomial(probs, 3000, True), 400).double()
    assert_unbiased(draws, probs, projections=20)
    wrong = probs.clone()
    wrong[0], wrong[1] = 0.6, probs[1] + 0.1
    with pytest.raises(AssertionError, match="biased in projections"):
        assert_unbiased(draws, wrong, projections=20)
    parts = {"a": draws[:, :100], "b": draws[:, 100:]}
    assert_unbiased(parts, {"a": probs[:100], "b": probs[100:]}, projections=20)


def test_variance_ratio():
    ratio = assert_variance_ratio(sample(scale=0.5), sample(), below=0.3, above=0.2)
    assert ratio == pytest.approx(0.25, rel=0.1)
    x = sample()
    with pytest.raises(AssertionError, match="not below 0.26: variance ratio 0.25, bound 0.2"):
        assert_variance_ratio(0.5 * x, x, below=0.26)
    with pytest.raises(AssertionError, match="not above 0.24: variance ratio 0.25, bound 0.2"):
        assert_variance_ratio(0.5 * x, x, above=0.24)
    parts = {"a": sample(), "b": sample((2000,))}
    assert_variance_ratio(parts, parts, below=1.2)
    assert assert_variance_ratio(torch.ones(5, 3), sample(), below=1e-3) == 0.0


def test_variance_ratio_errs_as_rarely_as_promised():
    failures = 0
    for _ in range(60):
        try:
            assert_variance_ratio(
                sample((100, 2)), sample((100, 2)), below=1.0, failure_rate=0.2, num_resamples=100
            )
        except AssertionError:
            failures += 1
    assert 38 <= failures <= 57  # the truth is 1.0: 48 expected
