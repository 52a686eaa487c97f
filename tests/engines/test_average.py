"""The average's decay and its step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from twinflow_train.engines.average import decay_at, follow


def test_the_decay_for_99_begins_as_published() -> None:
    assert [round(decay_at(0.99, n), 3) for n in (1, 2, 3)] == [0.495, 0.62, 0.69]


@pytest.mark.parametrize("target", [0.5, 0.99, 0.999, 0.9999])
def test_the_decay_grows_towards_its_target_and_not_beyond(target: float) -> None:
    decays = [decay_at(target, n) for n in range(2000)]
    assert decays[0] == 0
    assert all(a <= b <= target for a, b in pairwise(decays))
    assert decays[-1] > 0.9 * target


def test_the_decay_is_a_function_of_the_update_alone() -> None:
    late_first = [decay_at(0.987, n) for n in (50, 3, 50, 1)]
    d, expected = 0.0, [0.0]
    for _ in range(50):
        d += (1 - d) * (0.987 - d) / 2
        expected.append(d)
    assert late_first == [expected[n] for n in (50, 3, 50, 1)]


@pytest.mark.parametrize("decay", [0.0, 0.495, 0.99, 1.0])
def test_following_is_the_weighted_mean_in_place(decay: float) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (0, 4), (5,)]
    average = [torch.randn(shape, generator=draws) for shape in shapes]
    student = [torch.randn(shape, generator=draws, requires_grad=True) for shape in shapes]
    want = [
        decay * a.double() + (1 - decay) * s.detach().double()
        for a, s in zip(average, student, strict=True)
    ]
    kept = [s.detach().clone() for s in student]
    follow(average, student, decay, path=())
    for a, w, s, k in zip(average, want, student, kept, strict=True):
        torch.testing.assert_close(a.double(), w, rtol=0, atol=2e-7)
        assert not a.requires_grad
        assert torch.equal(s, k)


def test_following_on_and_on_ends_at_the_student() -> None:
    average, student = [torch.zeros(4)], [torch.ones(4)]
    for n in range(1, 1001):
        follow(average, student, decay_at(0.99, n), path=(n,))
    torch.testing.assert_close(average[0], student[0], rtol=1e-3, atol=0)
