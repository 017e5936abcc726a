# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import sys
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from torch.distributions import register_kl

from pyro_rb.ops.family import (
    find_changes,
    find_family,
    find_kl,
    is_exactly,
    strip_independent,
)
from pyro_rb.ops.gaussian import GaussianDraw
from pyro_rb.ops.score_identity import score_obstacle


class Named(dist.Normal):
    """Another constructor, a new method and a parameter that is computed: still a Normal."""

    arg_constraints = {"log_scale": dist.constraints.real}

    def __init__(self, log_scale):
        self.log_scale = log_scale
        super().__init__(0.0, 1.0)

    @property
    def scale(self):
        return self.log_scale.exp()

    @scale.setter
    def scale(self, value):
        pass

    def expand(self, batch_shape, _instance=None):
        return Named(self.log_scale.expand(batch_shape))

    def describe(self):
        return "a Normal"


class Mixin:
    def log_prob(self, value):
        return super().log_prob(value) + value


class WithMixin(Mixin, dist.Normal):
    pass


class BehindMixin(dist.Normal, Mixin):
    """Here the mixin's method is never called."""


def changed(name, base=dist.Normal, **members):
    return type(name, (base,), members or {name: getattr(base, name)})


def on_instance(name, fn=None):
    fn = dist.Normal(torch.zeros(2), 1.0) if fn is None else fn
    setattr(fn, name, lambda *args: getattr(type(fn), name)(fn, *args))
    return fn


METHODS = ("log_prob", "rsample", "sample", "entropy", "variance", "score_parts", "__call__", "support")


def test_of_torch_and_of_pyro():
    for room in (td, dist):
        assert is_exactly(room.Normal(0.0, 1.0), td.Normal)
        assert is_exactly(room.Laplace(0.0, 1.0), td.Laplace)
        assert is_exactly(room.MultivariateNormal(torch.zeros(2), torch.eye(2)), td.MultivariateNormal)
        assert is_exactly(room.Independent(room.Normal(torch.zeros(2), 1.0), 1), td.Independent)
    assert not is_exactly(dist.LogNormal(0.0, 1.0), td.TransformedDistribution)
    assert not is_exactly(dist.Normal(0.0, 1.0), td.Laplace)


def test_harmless_subclasses():
    for fn in (Named(torch.zeros(())), BehindMixin(0.0, 1.0)):
        assert is_exactly(fn, td.Normal) and find_family(fn) is td.Normal
    assert GaussianDraw(Named(torch.tensor(2.0))).scale == torch.tensor(2.0).exp()


@pytest.mark.parametrize("name", METHODS)
def test_changed_in_the_class(name):
    fn = changed(name)(0.0, 1.0)
    assert find_changes(fn, td.Normal) == [name]
    assert not is_exactly(fn, td.Normal) and find_family(fn) is None
    # Also if it is the class above that changes it.
    assert find_changes(type("Below", (type(fn),), {})(0.0, 1.0), td.Normal) == [name]


def test_changed_by_a_mixin():
    assert find_changes(WithMixin(0.0, 1.0), td.Normal) == ["log_prob"]


@pytest.mark.parametrize("name", ["log_prob", "rsample", "entropy"])
def test_changed_on_the_instance(name):
    assert find_changes(on_instance(name), td.Normal) == [name]
    independent = on_instance(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert strip_independent(independent) is independent and find_family(independent) is None


def test_values_that_are_computed_once_are_no_changes():
    fn = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    fn.precision_matrix, fn.scale_tril  # lazy: they become attributes
    assert is_exactly(fn, td.MultivariateNormal)


def test_independent_of_its_own_kind():
    fn = changed("log_prob", dist.Independent)(dist.Normal(torch.zeros(2), 1.0), 1)
    assert strip_independent(fn) is fn and strip_independent(fn, also_changed=True) is fn.base_dist
    nested = dist.Independent(dist.Independent(dist.Normal(torch.zeros(3, 2), 1.0), 1), 1)
    assert type(strip_independent(nested)) is dist.Normal


class Base(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + value.tanh()


class Derived(Base):
    def log_prob(self, value):
        return super().log_prob(value) + value.tanh()


def test_registered_divergences():
    normal, mvn = dist.Normal(0.0, 1.0), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    low_rank = dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2))
    event = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    for p, q in [(normal, dist.Laplace(0.0, 1.0)), (normal, dist.Gumbel(0.0, 1.0)), (mvn, low_rank), (low_rank, mvn)]:
        torch.testing.assert_close(find_kl(p, q)(p, q), td.kl_divergence(p, q))
    torch.testing.assert_close(find_kl(event, mvn)(event, mvn), td.kl_divergence(event, mvn))
    for family in (dist.Laplace, dist.Gumbel, dist.Normal):
        other = changed("log_prob", family)(0.0, 1.0)
        td.kl_divergence(normal, other)  # PyTorch takes that of the base class
        assert find_kl(normal, other) is None
    assert find_kl(normal, dist.StudentT(3.0)) is None
    assert find_kl(normal, dist.ExpandedDistribution(dist.Normal(0.0, 1.0), [2])) is None


def test_divergence_that_a_user_registers():
    from torch.distributions import kl

    def formula(p, q):
        return torch.zeros(())

    try:
        register_kl(td.Normal, Base)(formula)
        assert find_kl(dist.Normal(0.0, 1.0), Base(0.0, 1.0)) is formula
        assert find_kl(dist.Normal(0.0, 1.0), Derived(0.0, 1.0)) is None
    finally:
        kl._KL_REGISTRY.pop((td.Normal, Base))
        kl._KL_MEMOIZE.clear()


def test_gpytorch(monkeypatch):
    """Its own class has methods for structured covariances, which solve by Cholesky up to some size."""

    class GPyTorchNormal(dist.MultivariateNormal):
        def log_prob(self, value):
            return super().log_prob(value)

        def rsample(self, sample_shape=torch.Size()):
            return super().rsample(sample_shape)

    fn = GPyTorchNormal(torch.zeros(3), torch.eye(3))
    assert find_family(fn) is None and "is not known" in score_obstacle(fn)
    size = SimpleNamespace(value=lambda: 3)
    module = SimpleNamespace(
        distributions=SimpleNamespace(MultivariateNormal=GPyTorchNormal),
        settings=SimpleNamespace(max_cholesky_size=size),
    )
    monkeypatch.setitem(sys.modules, "gpytorch", module)
    assert find_family(fn) is td.MultivariateNormal
    assert score_obstacle(fn) is None and score_obstacle(fn.expand([2]).to_event(1)) is None
    assert "is not known" in score_obstacle(GPyTorchNormal(torch.zeros(4), torch.eye(4)))
    assert find_family(changed("log_prob", GPyTorchNormal)(torch.zeros(3), torch.eye(3))) is None
    assert find_family(GPyTorchNormal(torch.zeros(4), torch.eye(4))) is None
    prior = dist.MultivariateNormal(torch.ones(3), torch.eye(3))
    torch.testing.assert_close(find_kl(fn, prior)(fn, prior), torch.tensor(1.5))
