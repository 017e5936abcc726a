# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_rb.ops.graph import first_leaf, leaves, node_of, share_leaves


def identical(found, expected):
    return {id(tensor) for tensor in found} == {id(tensor) for tensor in expected}


def test_leaves_finds_each_leaf_once():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    root = (a * b + a.exp()).sum() + torch.ones(())
    found = list(leaves(root))
    assert len(found) == 2
    assert identical(found, [a, b])
    assert not identical(found, [a, c])


def test_leaves_does_not_look_behind_a_stop():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    hidden = a.exp()
    assert identical(leaves(hidden * b, stop={hidden.grad_fn}), [b])
    # Another way to the same leaf stays open.
    assert identical(leaves(hidden * b + a, stop={hidden.grad_fn}), [a, b])


def test_leaves_of_a_constant():
    assert list(leaves(torch.ones(()))) == []


def make_leaves(number):
    return [torch.ones((), requires_grad=True) for _ in range(number)]


def test_node_of():
    (a,) = make_leaves(1)
    b = a.exp()
    assert node_of(b) is b.grad_fn
    with torch.no_grad():
        assert node_of(a) is b.grad_fn.next_functions[0][0]


def test_first_leaf():
    a, b = make_leaves(2)
    hidden = a.exp()
    assert first_leaf(hidden * 2, {}) is a
    assert first_leaf(hidden * b, {hidden.grad_fn: None}) is b
    assert first_leaf(hidden * 2, {hidden.grad_fn: None}) is None
    assert first_leaf(torch.ones(()), {}) is None


def test_searches_share_what_they_found():
    a, b = make_leaves(2)
    chain, roots, found = a, [], {}
    for _ in range(50):
        chain = (chain * b).tanh()
        roots.append(chain + 1)
    for root in roots[::-1] + roots:
        assert any(first_leaf(root, found) is x for x in (a, b))
    assert len(found) <= 3 * 50 + 2
    dead_end = chain.detach().requires_grad_().exp()
    found = {dead_end.grad_fn: None}
    assert first_leaf(dead_end.exp(), found) is None
    assert first_leaf(dead_end.exp() + a, found) is a


def test_share_leaves_joins_through_others():
    a, b, c, d = make_leaves(4)
    roots = {1: [a + 1], 2: [b + 1], 3: [d + 1], 4: [a * c], 5: [c * b]}
    groups = share_leaves(roots)
    assert sorted(sorted(keys) for keys, _ in groups) == [[1, 2, 4, 5], [3]]
    for keys, found in groups:
        assert identical(found, [d] if keys == [3] else [a, b, c])


def test_share_leaves_of_several_roots():
    a, b, c = make_leaves(3)
    groups = share_leaves({"x": [a + 1, b + 1], "y": [b * 2], "z": [c * 2, torch.ones(())]})
    assert [keys for keys, _ in groups] == [["x", "y"], ["z"]]
    assert identical(groups[0][1], [a, b]) and identical(groups[1][1], [c])


def test_share_leaves_does_not_look_behind_a_stop():
    # Both use what was made of one draw, which is no parameter of theirs.
    a, b, c = make_leaves(3)
    draw = a.exp()
    shared = draw.tanh()
    roots = {"z1": [a * 2], "z2": [shared * b], "z3": [shared + c], "z4": [shared * 2]}
    groups = share_leaves(roots, {draw.grad_fn})
    assert [keys for keys, _ in groups] == [["z1"], ["z2"], ["z3"]]
    assert [keys for keys, _ in share_leaves(roots)] == [["z1", "z2", "z3", "z4"]]


def test_share_leaves_without_leaves():
    assert share_leaves({"x": [], "y": [torch.ones(())]}) == []


def test_share_leaves_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        tensors = make_leaves(6)
        for _ in range(12):
            i, j = torch.randint(len(tensors), (2,), generator=generator, device="cpu").tolist()
            tensors.append(tensors[i] * tensors[j])
        roots = {key: [tensor] for key, tensor in enumerate(tensors) if tensor.grad_fn is not None}
        own = {key: {id(leaf) for leaf in leaves(*root)} for key, root in roots.items()}
        together = {key: {key} for key in roots}
        for _ in roots:
            for one in roots:
                for other in roots:
                    if own[one] & own[other]:
                        together[one] |= together[other]
        groups = share_leaves(roots)
        assert sorted(map(sorted, (keys for keys, _ in groups))) == sorted(
            map(list, {tuple(sorted(keys)) for keys in together.values()})
        )
        for keys, found in groups:
            assert {id(leaf) for leaf in found} == set.union(*[own[key] for key in keys])


def test_share_leaves_takes_time_in_proportion_to_the_graph():
    # Each of the sites depends on the states of all before it.
    class Counted(dict):
        visits = 0

        def __contains__(self, key):
            Counted.visits += 1
            return super().__contains__(key)

    visits = []
    for size in (100, 200):
        Counted.visits = 0
        a, b = make_leaves(2)
        state, found = a, Counted()
        for _ in range(size):
            state = (state * b).tanh()
            first_leaf(state + 1, found)
        visits.append(Counted.visits)
    assert visits[1] < 2.2 * visits[0]
