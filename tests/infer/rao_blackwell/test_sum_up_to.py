# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which sites are summed over all of their values by ``sum_up_to``, the default."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyro_rb
from pyro_rb import RaoBlackwell_ELBO
from pyro_rb.poutine import topk_room
from tests.infer.rao_blackwell.models import fixed
from tests.support.cases import Case
from tests.support.compiled import needs_compiled
from tests.support.elbo_contract import assert_same, evaluate


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def make_case(*sizes, num=3, event=1, infer=None, joint=True):
    """Sites with so many values in a plate, and observed vectors that depend on all or on one each."""
    pyro.clear_param_store()

    def model():
        with pyro.plate("data", num):
            sites = [pyro.sample(f"z_{i}", dist.Categorical(torch.ones(k))) for i, k in enumerate(sizes)]
            values = [sum(sites).double()] if joint else [z.double() for z in sites]
            for i, value in enumerate(values):
                x = dist.Normal(value.unsqueeze(-1).expand(value.shape + (event,)), 1.0).to_event(1)
                pyro.sample(f"x_{i}", x, obs=torch.zeros(num, event))

    def guide():
        with pyro.plate("data", num):
            for i, k in enumerate(sizes):
                logits = pyro.param(f"logits_{i}", fixed(num, k, seed=i))
                pyro.sample(f"z_{i}", dist.Categorical(logits=logits), infer=(infer or {}).get(i, {}))

    return Case(model, guide)


def report_of(case, nesting=1, **options):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=nesting, **options)
    elbo.loss_and_grads(case.model, case.guide)
    return {row.site: row for row in elbo.report()}


def summed(case, **options):
    """Numbers of the sites that are summed."""
    return [int(name[2:]) for name, row in report_of(case, **options).items() if row.treatment == "exact"]


@pytest.mark.parametrize(
    "options, infer, expected",
    [
        ({}, {}, [0, 1]),
        ({"sum_up_to": 5}, {}, [0]),
        ({"sum_up_to": 0}, {}, []),
        ({"budget": 3}, {}, []),
        ({"budget": 7, "sum_up_to": 4}, {}, [0]),
        ({"k": 1}, {}, []),
        ({"num_samples": 2}, {}, []),
        ({}, {0: {"topk": 2}, 1: {"topk": {"budget": 4}}}, []),
        ({"budget": 3}, {1: {"topk": {"sum_up_to": 12}}}, [1]),
        ({}, {0: {"topk": {}}}, [0, 1]),
    ],
)
def test_by_number_of_values(options, infer, expected):
    case = make_case(4, 12, 33, infer=infer, joint=False)
    assert summed(case, **options) == expected


def test_values_up_to_the_limit():
    for size, options, treatment in ((32, {}, "exact"), (33, {}, "top-k"), (33, {"sum_up_to": 33}, "exact")):
        (row,) = report_of(make_case(size), **options).values()
        assert row.treatment.startswith(treatment) and ";" not in row.reason


def test_product_with_earlier_sites():
    rows = report_of(make_case(16, 16, 4, joint=False))
    assert [row.treatment for row in rows.values()][:2] == ["exact", "exact"]
    assert rows["z_2"].reason == "3 of 4 values; all would be 1024 evaluations, with earlier sites"


def test_sizes_of_plates():
    (row,) = report_of(make_case(8, num=2**15 + 1)).values()
    assert row.reason == "3 of 8 values; all would be 262152 elements"


@pytest.mark.parametrize("pre_activations", ["auto", None])
def test_events_of_the_model(pre_activations):
    """What is drawn in the guide is drawn again, with the same random numbers."""
    case = make_case(8, 5, num=100, event=200)
    options = {"max_plate_nesting": 1, "pre_activations": pre_activations}
    elbos = RaoBlackwell_ELBO(**options), RaoBlackwell_ELBO(budget=3, **options)
    for seed in range(3):
        assert_same(*(evaluate(elbo, case, seed=seed) for elbo in elbos))
    for row in elbos[0].report():
        assert row.treatment.startswith("top-k")
        assert row.reason.endswith("values; all would be 800000 elements at site 'x_0'"), row
    again = RaoBlackwell_ELBO(max_plate_nesting=1)
    again.load_state_dict(elbos[0].state_dict())
    assert again._never_summed == elbos[0]._never_summed and len(again._never_summed) == 2
    # Of a smaller batch, as of a larger one before it.
    assert summed(make_case(8, 5, num=10, event=200)) == [0, 1]


def test_no_product_is_refused_that_would_not_be_with_few_values():
    case = make_case(*[5] * 9, num=1)
    rows = report_of(case)
    assert "evaluations at site 'x_0'" in rows["z_0"].reason
    assert sum(row.treatment == "exact" for row in rows.values()) == 1
    with pytest.raises(ValueError, match="max_evaluations=65536"):
        report_of(make_case(*[5] * 11, num=1), budget=3)


def test_no_site_has_a_single_draw_for_it():
    """There is room for twelve sites with three values each."""
    rows = report_of(make_case(*[5] * 12, num=1, joint=False))
    assert not any("single draw" in row.treatment for row in rows.values())
    assert rows["z_0"].reason == "3 of 5 values; all would be too many with later sites"


@pytest.mark.parametrize("is_sequential", [False, True], ids=["markov", "plate"])
def test_sites_of_a_loop(is_sequential):
    """Steps of a chain are summed one after the other; those of a plate do not meet."""

    def loop():
        return pyro.plate("steps", 6) if is_sequential else pyro.markov(range(6))

    def run(make):
        z = torch.tensor(0)
        for t in loop():
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=make(t)[z]))
            z = torch.tensor(0) if is_sequential else z

    case = Case(
        lambda: run(lambda t: fixed(16, 16, seed=t)),
        lambda: run(lambda t: pyro.param(f"logits_{t}", fixed(16, 16, seed=t + 9))),
    )
    assert summed(case, nesting=0) == list(range(6))


def test_truncated_tables_are_not_summed():
    """Their length would change with the parameters."""

    def model():
        pyro.sample("z_0", dist.Poisson(2.0))

    def guide():
        pyro.sample("z_0", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    assert summed(Case(model, guide)) == []


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_within_other_loops(vectorize, monkeypatch):
    """A site that is enumerated in a loop, particles, and a limit that is found late."""
    monkeypatch.setattr(topk_room, "MAX_SUMMED_ELEMENTS", 100)
    case = make_case(5, 7, num=2, event=9, infer={0: {"enumerate": "sequential"}})
    options = {"max_plate_nesting": 2, "num_particles": 2, "vectorize_particles": vectorize}
    if vectorize:
        case = make_case(7, num=2, event=9)
    elbos = RaoBlackwell_ELBO(**options), RaoBlackwell_ELBO(budget=3, **options)
    for seed in range(3):
        assert_same(*(evaluate(elbo, case, seed=seed) for elbo in elbos))
    assert "at site 'x_0'" in elbos[0].report()[-1].reason


@needs_compiled
def test_compiled_steps_follow():
    """A graph that was captured while a site was summed is not used once it no longer is."""
    def run(wrap):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def model(num):
            with pyro.plate("data", num):
                y = pyro.sample("y", dist.Categorical(torch.ones(10))).double()
                x = dist.Normal(y.unsqueeze(-1).expand(y.shape + (300,)), 1.0).to_event(1)
                pyro.sample("x", x, obs=torch.ones(num, 300))

        def guide(num):
            logits = pyro.param("logits", torch.zeros(10))
            with pyro.plate("data", num):
                pyro.sample("y", dist.Categorical(logits=logits))

        elbo = wrap(RaoBlackwell_ELBO(max_plate_nesting=1))
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        return torch.tensor([svi.step(num) for num in [5] * 12 + [100] * 12 + [5] * 3])

    assert_same(run(lambda elbo: pyro_rb.compile(elbo, "replay")), run(lambda elbo: elbo))
