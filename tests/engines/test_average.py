"""The average's decay and its step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from twinflow_train.engines.average import decay_at, follow, round_randomly
from twinflow_train.rng import generator


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


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-7 - 2**-12, -3.0 - 2**-8, 1e-30])
def test_rounding_at_random_keeps_the_mean(value: float) -> None:
    many = 1 << 16
    out = torch.empty(many, dtype=torch.bfloat16)
    round_randomly(out, torch.full((many,), value), generator("test", value))
    low, high = (float(found) for found in out.float().unique())
    assert low < value < high
    assert low == pytest.approx(high, rel=2**-7)  # neighbours
    up = (torch.tensor(value, dtype=torch.float32).item() - low) / (high - low)
    allowed = 5 * (up * (1 - up) / many) ** 0.5
    assert float((out.float() == high).double().mean()) == pytest.approx(up, abs=allowed)


def test_rounding_at_random_leaves_what_bfloat16_can_hold() -> None:
    values = torch.tensor([0.0, 1.0, -2.5, 2.0**-120, 3e38]).bfloat16()
    out = torch.empty_like(values)
    round_randomly(out, values.float(), generator("test"))
    assert torch.equal(out, values)


def test_an_average_in_bfloat16_follows_where_rounding_to_the_nearest_would_stay() -> None:
    many, decay, student = 4096, 0.99, 1.01
    average, other = [torch.ones(many, dtype=torch.bfloat16)], [torch.ones(many)]
    for n in range(100):
        follow(average, [torch.full((many,), student)], decay, path=(n,))
        follow(other, [torch.full((many,), student)], decay, path=(n,))
    expected = student - (student - 1.0) * decay**100
    assert float(other[0].mean()) == pytest.approx(expected, abs=1e-5)
    assert float(average[0].double().mean()) == pytest.approx(expected, abs=3e-4)
    assert average[0].dtype == torch.bfloat16
    stuck = torch.tensor(1.0 + (1 - decay) * (student - 1.0)).bfloat16()
    assert float(stuck) == 1.0


def test_the_draws_of_an_update_are_those_of_its_path() -> None:
    def after(*path: object) -> torch.Tensor:
        average = [torch.ones(64, dtype=torch.bfloat16) for _ in range(2)]
        follow(average, [torch.full((64,), 1.3)] * 2, 0.5, path=path)
        assert not torch.equal(*average)
        return torch.stack(average)

    assert torch.equal(after("average", 1, 0), after("average", 1, 0))
    assert not torch.equal(after("average", 1, 0), after("average", 1, 1))


def test_a_float32_average_follows_a_student_of_another_type() -> None:
    average, student = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0]).bfloat16()]
    follow(average, student, 0.75, path=())
    assert average[0].tolist() == [1.5, 1.0]
    assert average[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_host_memory_follows_a_student_on_a_gpu(dtype: torch.dtype) -> None:
    average, student = torch.linspace(0, 1, 1000).to(dtype), torch.linspace(2, 5, 1000)
    want = average.clone()
    follow([want], [student], 0.9, path=())
    follow([average], [student.cuda()], 0.9, path=())
    assert average.device.type == "cpu"
    torch.testing.assert_close(average, want, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
