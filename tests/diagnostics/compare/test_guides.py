# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import builtins
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_rb import RVRSGuide, compare_guides
from pyro_rb.diagnostics import compare
from pyro_rb.diagnostics.compare import guides as guides_module
from pyro_rb.diagnostics.compare import race as race_module
from pyro_rb.diagnostics.compare.guides import GuideComparison, GuideResult

pytestmark = pytest.mark.slow

#: An observation of the sum of both.
X = torch.tensor(1.0)


def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=X)


EVIDENCE = dist.Normal(0.0, (2 + 0.3**2) ** 0.5).log_prob(X).item()


@pytest.fixture
def quick(monkeypatch):
    """One learning rate, a clock by which a step takes 2 ms on every machine, and no hidden column."""
    monkeypatch.setenv("COLUMNS", "160")
    ticks = itertools.count()
    monkeypatch.setattr(race_module, "choose_clock", lambda tensors: lambda: 0.002 * next(ticks))
    monkeypatch.setattr(guides_module, "NUM_DRAWS", 400)
    monkeypatch.setattr(guides_module, "LEARNING_RATES", (0.05,))


def test_elbo_and_khat_tell_which_guide_is_better(quick):
    guides = {
        "mean field": AutoNormal(model),
        "full rank": AutoMultivariateNormal(model),
        "point": AutoDelta(model),
        "rejection": RVRSGuide(model, AutoNormal(model)),
        "other model": AutoNormal(lambda: pyro.sample("q", dist.Normal(0.0, 1.0))),
    }
    result = compare_guides(model, guides, seconds=0.6, progress=False)
    assert [row.name for row in result.guides] == list(guides)
    mean_field, full_rank, point, rejection, other = result.guides
    assert abs(full_rank.elbo - EVIDENCE) < 0.05 + 4 * full_rank.elbo_error
    precision = torch.eye(2) + 1 / 0.3**2
    # The best mean field has the conditional variances, and this divergence from the posterior.
    best = EVIDENCE - 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert abs(mean_field.elbo - best) < 0.1 + 4 * mean_field.elbo_error
    assert full_rank.khat < 0.7 and mean_field.khat is not None and mean_field.num_values == 4
    assert mean_field.elbo < rejection.elbo and rejection.khat is None and rejection.steps > 0
    assert "point estimate" in point.error and "do not match" in other.error
    assert str(result).startswith("Trained each guide for 0.6 s: full rank has the highest ELBO, by ")
    assert "other model failed: ValueError: model and guide do not match" in str(result)
    assert not list(pyro.get_param_store())


def test_no_khat_of_subsamples_or_other_losses(quick):
    """Whose values are not log weights of draws alone."""
    data = torch.randn(50)

    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample_size=5) as i:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    options = {"seconds": 0.1, "progress": False}
    (row,) = compare_guides(subsampled, {"a": AutoNormal(subsampled)}, **options).guides
    assert row.khat is None and row.error is None and math.isfinite(row.elbo)
    (row,) = compare_guides(model, {"a": AutoNormal(model)}, loss="TraceMeanField_ELBO", **options).guides
    assert row.khat is None and row.error is None


def test_compare_has_them(quick):
    options = {"num_samples": 4, "num_burn_in": 0, "train_steps": 0, "progress": False, "train": 0.05}
    others = {"AutoMultivariateNormal": AutoMultivariateNormal(model)}
    result = compare(model, AutoNormal(model), ["STLTrace_ELBO"], guides=others, **options)
    assert [row.name for row in result.guides.guides] == ["AutoNormal", "AutoMultivariateNormal"]
    for text in (str(result), result.to_html()):
        assert "k-hat" in text and "ELBO, nats" in text
    assert result.to_dict()["guides"]["guides"][0]["num_values"] == 4


def test_sentence():
    rows = [GuideResult("a", elbo=-1.0, elbo_error=0.3, khat=0.9), GuideResult("b", elbo=-3.0, elbo_error=0.4)]
    assert str(GuideComparison(2.0, rows)) == (
        "Trained each guide for 2 s: a has the highest ELBO, by 2 +/- 0.5 nats. Close to the posterior "
        "(k-hat of 0.7 or less): none."
    )
    assert "none has a finite ELBO" in str(GuideComparison(2.0, [GuideResult("a", elbo=math.nan)]))


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="guides: expected a dict of guides by name, got {}"):
        compare_guides(model, {})
    with pytest.raises(ValueError, match="seconds: expected a number > 0, got -1"):
        compare_guides(model, {"a": AutoNormal(model)}, seconds=-1)
    usual = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "arviz":
            raise ImportError("no arviz")
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "pyro_rb\[arviz\]"'):
        compare(model, AutoNormal(model), guides={"a": AutoNormal(model)}, progress=False)
