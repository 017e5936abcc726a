# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_rb.ops.topk import PROBE
from pyro_rb.poutine import DrawMessenger, TopK, TopKModelMessenger, TopKOptions
from pyro_rb.poutine.draw_messenger import Declined
from pyro_rb.poutine.topk_room import MAX_DIMS, MAX_JOINT
from pyro_rb.poutine.topk_table import (
    MAX_TABLE,
    MIN_GATHER,
    GatherCategorical,
    NoTable,
    TableTooLarge,
    find_table,
)


def run(guide, nesting=1, options=TopKOptions(), **kwargs):
    handler = DrawMessenger([TopK(options, **kwargs)], -1 - nesting)
    return handler, poutine.trace(handler(guide)).get_trace()


# -- Values and slots ---------------------------------------------------------------


DISTRIBUTIONS = {
    "Categorical": dist.Categorical(logits=torch.randn(4, 5)),
    "Categorical_shared": dist.Categorical(logits=torch.randn(5)).expand([4]),
    "Categorical_probs": dist.Categorical(probs=torch.rand(4, 5)),
    "OneHotCategorical": dist.OneHotCategorical(logits=torch.randn(4, 5)),
    "Binomial": dist.Binomial(4, torch.rand(4)),
    "BetaBinomial": dist.BetaBinomial(torch.ones(4), 2 * torch.ones(4), 4),
    "Poisson": dist.Poisson(torch.tensor([0.1, 1.0, 2.0, 3.0])),
    "Geometric": dist.Geometric(torch.tensor([0.3, 0.5, 0.7, 0.9])),
    "NegativeBinomial": dist.NegativeBinomial(3.0, torch.tensor([0.1, 0.2, 0.5, 0.7])),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("options", [TopKOptions(2, 1), TopKOptions(budget=3), TopKOptions(0, 3)])
def test_values_and_weights_belong_together(name, options):
    fn = DISTRIBUTIONS[name]

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", fn)

    _, trace = run(guide, nesting=2, options=options)
    trace.compute_log_prob()
    site = trace.nodes["z"]
    slots = site["infer"]["_topk"]
    assert site["infer"]["_enumerate_dim"] == -3
    assert site["value"].shape == (3, 1, 4) + fn.event_shape
    assert site["value"].dtype == fn.sample().dtype
    assert all(x.shape == (3, 1, 4) for x in slots)
    assert site["fn"].support.check(site["value"]).all()
    log_q = fn.log_prob(site["value"])
    torch.testing.assert_close(site["log_prob"], log_q)
    torch.testing.assert_close(slots.log_weight[slots.is_top], log_q[slots.is_top], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slots.log_weight.exp().sum(0), torch.ones(1, 4))


def test_first_of_k_values_is_the_mode():
    probs = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])

    def guide():
        with pyro.plate("data", 2):
            return pyro.sample("z", dist.Categorical(probs))

    _, trace = run(guide)
    assert trace.nodes["_RETURN"]["value"][0].tolist() == [2, 0]


def test_downstream_sites_have_slots_of_their_own():
    def guide():
        a = pyro.sample("a", dist.Categorical(logits=torch.zeros(7)))
        pyro.sample("b", dist.Categorical(logits=torch.randn(7, 6)[a]))
        pyro.sample("c", dist.Normal(a.double(), 1.0))

    _, trace = run(guide, nesting=0, options=TopKOptions(2, 2))
    b, c = trace.nodes["b"], trace.nodes["c"]
    assert trace.nodes["a"]["value"].shape == (4,)
    assert b["value"].shape == (4, 4) and b["infer"]["_enumerate_dim"] == -2
    assert b["infer"]["_topk"].category.shape == (4, 4)
    assert len(set(c["value"].tolist())) == 4


def test_probe_is_one_more_slot():
    def guide():
        return pyro.sample("z", dist.Categorical(logits=torch.zeros(7)))

    handler, trace = run(guide, options=TopKOptions(2, 2), probe=True)
    slots = trace.nodes["z"]["infer"]["_topk"]
    assert slots.log_weight.shape == (5, 1) and slots.log_weight[-1] == PROBE
    assert handler.reasons["z"] == "5 of 7 values, one of them for the baseline"


def test_all_values_are_left_to_pyro():
    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Categorical(logits=torch.zeros(3)))

    for options in (TopKOptions(2, 1), TopKOptions(budget=3), TopKOptions(9, 9)):
        _, trace = run(guide, options=options, probe=True)
        assert trace.nodes["z"]["value"].squeeze().tolist() == [0, 1, 2]
        assert "_topk" not in trace.nodes["z"]["infer"]


def test_a_window_is_enumerated_in_full():
    def guide():
        return pyro.sample("z", dist.Poisson(torch.tensor(0.5)))

    handler, trace = run(guide, options=TopKOptions(100, 1))
    site = trace.nodes["z"]
    trace.compute_log_prob()
    assert "_topk" not in site["infer"] and site["value"].squeeze().tolist() == list(range(40))
    torch.testing.assert_close(site["log_prob"].exp().sum(), torch.tensor(1.0))


def test_draws_in_a_plate_are_independent():
    def guide():
        with pyro.plate("data", 1000):
            return pyro.sample("z", dist.Categorical(logits=torch.zeros(50)))

    _, trace = run(guide)
    assert len(set(trace.nodes["z"]["value"][1].tolist())) == 49


def test_other_sites_are_left_alone():
    def guide():
        pyro.sample("observed", dist.Categorical(torch.ones(5)), obs=torch.tensor(1))
        pyro.sample("normal", dist.Normal(0.0, 1.0))
        pyro.sample("hidden", dist.Categorical(torch.ones(5)), infer={"_do_not_trace": True, "is_auxiliary": True})
        pyro.sample("auxiliary", dist.Categorical(torch.ones(5)), infer={"is_auxiliary": True})
        with pyro.plate("data", 5, 2) as i:
            assert i.shape == (2,)
        with poutine.condition(data={"fixed": torch.tensor(3)}):
            assert pyro.sample("fixed", dist.Categorical(torch.ones(5))) == 3

    handler, _ = run(guide)
    assert handler.reasons == {"normal": "reparameterized", "auxiliary": "2 of 5 values"}


def test_handler_can_be_used_again():
    def guide():
        pyro.sample("z", dist.Categorical(torch.ones(5)))

    handler = DrawMessenger([TopK(TopKOptions())], -1)
    for _ in range(2):
        trace = poutine.trace(handler(guide)).get_trace()
        assert trace.nodes["z"]["infer"]["_enumerate_dim"] == -1
        assert [site.name for site in handler.strategies[0].enumerated] == ["z"]


def test_infer_of_the_user_is_not_changed():
    infer = {"topk": 2}
    run(lambda: pyro.sample("z", dist.Categorical(torch.ones(5)), infer=infer))
    assert infer == {"topk": 2}


# -- Tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn, reason",
    [
        (dist.Normal(0.0, 1.0), "reparameterized"),
        (dist.Poisson(torch.ones(2)).to_event(1), "2 variables without a largest value; in a plate, without to_event"),
        (dist.Bernoulli(0.5 * torch.ones(2)).mask(True).to_event(1), "poutine.mask"),
        (dist.Bernoulli(0.5).mask(True), "poutine.mask"),
        (dist.Categorical(torch.ones(3)).expand([2]).mask(torch.ones(2) > 0), "poutine.mask"),
        (dist.Binomial(torch.tensor([2.0, 3.0]), torch.tensor(0.5)), "no enumerable support"),
        (dist.VonMises(0.0, 1.0), "no enumerable support"),
        (dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.5)), "no enumerable support"),
        (dist.Multinomial(3, torch.ones(3)), "no enumerable support"),
    ],
)
def test_no_table(fn, reason):
    with pytest.raises(NoTable, match=reason):
        find_table(fn)
    handler, _ = run(lambda: pyro.sample("z", fn), nesting=1)
    assert reason in handler.reasons["z"]
    with pytest.raises(ValueError, match=f"'topk': 1.* at guide site 'z'.*{reason}.*'topk': 0"):
        run(lambda: pyro.sample("z", fn, infer={"topk": 1}))
    run(lambda: pyro.sample("z", fn, infer={"topk": 0}))


@pytest.mark.parametrize(
    "fn",
    [
        dist.Poisson(1e8),
        dist.Poisson(torch.tensor(math.nan), validate_args=False),
        dist.Poisson(300.0 * torch.rand(30000)),
        dist.Geometric(1e-6),
        dist.NegativeBinomial(10.0, torch.tensor(0.999999)),
        dist.Binomial(10**6, torch.rand(100)),
        dist.Binomial(10**9, torch.rand(())),
        dist.BetaBinomial(torch.ones(100), torch.ones(100), 10**6),
        dist.Categorical(logits=torch.zeros(2**12, 1).expand(2**12, 2**12)),
        dist.OneHotCategorical(logits=torch.zeros(2**12, 1).expand(2**12, 2**12)),
    ],
    ids=lambda fn: type(fn).__name__,
)
@pytest.mark.parametrize("infer", [{}, {"topk": 3}])
def test_a_table_that_is_too_large_is_a_plain_draw(fn, infer):
    with pytest.raises(TableTooLarge, match=f"elements, more than {MAX_TABLE}"):
        find_table(fn)
    topk = TopK(TopKOptions())
    msg = {"name": "z", "fn": fn, "infer": infer}
    with pytest.raises(Declined, match="elements, more than"):
        topk._find_table(msg)


def test_size_is_that_of_the_rows_that_differ():
    fn = dist.Poisson(torch.tensor([[300.0], [1.0]])).expand([2, 10**6])
    assert find_table(fn).log_q.shape[:-1] == (2, 1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tables_are_normalized(name):
    log_q = find_table(DISTRIBUTIONS[name]).log_q
    assert not log_q.requires_grad
    total = log_q.double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


R = torch.tensor([[0.2], [0.7], [0.9]])
SHARED = {
    "Poisson": lambda: dist.Poisson(300.0),
    "Poisson_partly": lambda: dist.Poisson(9.0 * R),
    "Bernoulli": lambda: dist.Bernoulli(R),
    "Binomial": lambda: dist.Binomial(7, R),
    "Binomial_logits": lambda: dist.Binomial(torch.tensor([[7.0]]), logits=R[0]),
    "BetaBinomial": lambda: dist.BetaBinomial(R, R[0], 4),
    "Geometric": lambda: dist.Geometric(R),
    "Geometric_logits": lambda: dist.Geometric(logits=R),
    "NegativeBinomial": lambda: dist.NegativeBinomial(3.0, R),
    "NegativeBinomial_logits": lambda: dist.NegativeBinomial(3.0, logits=R),
    "Categorical": lambda: dist.Categorical(torch.rand(3, 1, 8)),
    "Categorical_logits": lambda: dist.Categorical(logits=torch.randn(8)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(logits=torch.randn(8)),
}


@pytest.mark.parametrize("is_looked_at", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_shared_table_is_not_expanded(name, is_looked_at):
    fn = SHARED[name]()
    wide = fn.expand([3, 50])
    if is_looked_at:
        # Makes the one of the other, for each element.
        [getattr(wide, name, None) for name in ("probs", "logits")]
    table = find_table(wide)
    rows = fn.batch_shape.numel()
    assert table.log_q.numel() == rows * table.num_categories
    values = table.values(torch.arange(table.num_categories).expand(3, 50, -1))
    expected = wide.log_prob(values).movedim(0, -1)
    torch.testing.assert_close(table.log_q.expand_as(expected), expected, atol=1e-4, rtol=1e-4)


def test_draws_from_a_shared_table_are_independent():
    def guide():
        with pyro.plate("data", 1000):
            return pyro.sample("z", dist.Poisson(300.0))

    _, trace = run(guide, options=TopKOptions(budget=3))
    assert len(set(trace.nodes["z"]["value"][0].tolist())) > 50


# -- Categorical without expansion ---------------------------------------------------------


def test_gather_categorical():
    logits = torch.randn(3, 5, requires_grad=True)
    fn = dist.Categorical(logits=logits)
    cheap = GatherCategorical(logits=logits)
    for shape in [(3,), (4, 3), (4, 1), (2, 4, 3), ()]:
        value = torch.randint(5, shape)
        actual, expected = cheap.log_prob(value), fn.log_prob(value)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(x.square().sum(), logits, retain_graph=True)[0] for x in (actual, expected)]
        torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="within the support"):
        cheap.log_prob(torch.tensor([0, 5, 0]))
    assert torch.equal(cheap.expand([2, 3]).log_prob(torch.zeros(2, 3)), fn.log_prob(torch.zeros(2, 3)))


def test_only_large_categoricals_are_turned():
    large = dist.Categorical(torch.rand(3, MIN_GATHER), validate_args=False)
    turned = GatherCategorical.of(large)
    assert type(turned) is GatherCategorical and turned.batch_shape == (3,)
    assert torch.equal(turned.probs, large.probs) and turned._validate_args is False
    shared = GatherCategorical.of(dist.Categorical(torch.rand(MIN_GATHER)).expand([10, 3]))
    assert shared.logits.stride()[:2] == (0, 0) and shared.batch_shape == (10, 3)
    torch.testing.assert_close(shared.logits, shared.probs.log())
    others = [dist.Bernoulli(0.5), large.mask(True), turned, dist.Categorical(torch.ones(MIN_GATHER - 1))]
    assert all(GatherCategorical.of(other) is other for other in others)


def test_model_gets_the_cheap_categorical_at_treated_sites():
    def model():
        for name in "zy":
            pyro.sample(name, dist.Categorical(torch.ones(MIN_GATHER)))

    topk = TopK(TopKOptions())
    guide = DrawMessenger([topk], -1)
    fn = dist.Categorical(torch.ones(MIN_GATHER))
    guide_trace = poutine.trace(guide(lambda: pyro.sample("z", fn))).get_trace()
    assert type(guide_trace.nodes["z"]["fn"]) is GatherCategorical
    model = poutine.replay(TopKModelMessenger(topk)(model), trace=guide_trace)
    trace = poutine.trace(model).get_trace()
    assert type(trace.nodes["z"]["fn"]) is GatherCategorical
    assert type(trace.nodes["y"]["fn"]) is dist.Categorical


# -- Products of slots ----------------------------------------------------------------------


def chain(length, size=5):
    def guide():
        z = torch.tensor(0)
        for i in range(length):
            z = pyro.sample(f"z_{i}", dist.Categorical(logits=torch.eye(size)[z]))

    return guide


def test_product_in_the_guide():
    run(chain(6), max_evaluations=64)
    message = (
        r"Site 'z_6' needs 128 evaluations.*'z_0': 2.*'z_6': 2.*max_evaluations=64.*\{'topk': 0\}"
    )
    with pytest.raises(ValueError, match=message):
        run(chain(7), max_evaluations=64)


def test_product_in_the_model():
    def guide():
        return [pyro.sample(f"z_{i}", dist.Categorical(torch.ones(5))) for i in range(7)]

    def model():
        pyro.sample("x", dist.Normal(sum(guide()), 1.0), obs=torch.tensor(0.0))

    topk = TopK(TopKOptions(), max_evaluations=64)
    trace = poutine.trace(DrawMessenger([topk], -1)(guide)).get_trace()
    model = poutine.replay(TopKModelMessenger(topk)(model), trace=trace)
    with pytest.raises(ValueError, match="Site 'x' needs 128 evaluations.*'z_0': 2.*'z_6': 2"):
        model()


def test_one_large_site_is_no_product():
    run(lambda: pyro.sample("z", dist.Categorical(torch.ones(100))), options=TopKOptions(80, 1), max_evaluations=64)


def test_more_sites_than_can_be_risked_are_plain():
    def guide():
        for i in range(30):
            pyro.sample(f"z_{i}", dist.Categorical(torch.ones(5)))

    handler, _ = run(guide)
    treated = int(math.log2(MAX_JOINT))
    assert [site.name for site in handler.strategies[0].enumerated] == [f"z_{i}" for i in range(treated)]
    assert f"more than {MAX_JOINT} terms" in handler.reasons["z_29"]


def test_iterations_of_a_sequential_plate_do_not_multiply():
    def guide():
        for i in pyro.plate("data", 60):
            a = pyro.sample(f"a_{i}", dist.Categorical(torch.ones(5)))
            assert a.dim() == 0 or a.shape[0] == 2

    handler, _ = run(guide)
    assert len(handler.strategies[0].enumerated) == MAX_DIMS - 1
    assert handler.reasons["a_59"] == "no tensor dim is left"


def test_sites_that_share_a_dim_do_not_multiply():
    def guide():
        for i in pyro.markov(range(60)):
            pyro.sample(f"z_{i}", dist.Categorical(torch.ones(5)))

    handler, _ = run(guide)
    assert len(handler.strategies[0].enumerated) == 60


def test_options_are_checked():
    assert TopKOptions.make() == TopKOptions(1, 1, None)
    assert TopKOptions.make(k=0).num_slots == 1
    assert TopKOptions.make(budget=5).num_slots == 5
    assert TopKOptions.make(sum_up_to=9, default=TopKOptions(budget=3)) == TopKOptions(budget=3, sum_up_to=9)
    assert TopKOptions.make(k=2, default=TopKOptions(budget=3, sum_up_to=9)) == TopKOptions(k=2)
    with pytest.raises(ValueError, match="Invalid num_samples at guide site 'z': 0"):
        TopKOptions.make(num_samples=0, where=" at guide site 'z'")
