"""Roles: exact shares, dealt so that ranks, micro-batches and accumulation change nothing."""

from fractions import Fraction
from itertools import chain

import pytest
import torch
import torch.distributed as torch_dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import spawn
from tests.objectives.toys import gradients, network, part_of, step_of_rank, toy_batch
from twinflow_train.batch import Condition, Times, Velocity
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.objectives.presets import twinflow_image_free, twinflow_paper
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import Loss, TwinFlow

ROLES = ("generator", "local", "jump", "direct", "fake")
DEALS = [(1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2), (4, 1, 2)]
OBJECTIVES = {
    "twinflow": TwinFlow(),
    "self": TwinFlow(teacher_decay=0.0, null_share=0.5),
    "paper": twinflow_paper(),
    "image_free": twinflow_image_free(),
    "crooked": TwinFlow(shares=Shares(generator=3, local=1, jump=1, fake=3), order=1),
}


def largest_remainder(shares: list[str], batch: int) -> dict[str, int]:
    """Hand out what is left after rounding down, one sample at a time, in exact fractions."""
    each = dict(zip(ROLES, map(Fraction, shares), strict=True))
    exact = {role: batch * share / sum(each.values()) for role, share in each.items()}
    counts = {role: int(value) for role, value in exact.items()}
    while sum(counts.values()) < batch:
        behind = max(exact[role] - counts[role] for role in ROLES)
        counts[next(role for role in ROLES if exact[role] - counts[role] == behind)] += 1
    return counts


def check_counts(shares: list[str], batch: int) -> None:
    expected = largest_remainder(shares, batch)
    ours = Shares(**dict(zip(ROLES, map(float, shares), strict=True)))
    left_out = [role for role in ROLES if getattr(ours, role) and not expected[role]]
    if left_out:
        with pytest.raises(ValueError, match=rf"objective\.shares\.({'|'.join(left_out)}) .*batch"):
            ours.counts(batch)
    else:
        assert ours.counts(batch) == expected


@given(st.lists(st.integers(0, 12), min_size=5, max_size=5).filter(any), st.integers(1, 200))
@settings(deadline=None, max_examples=300)
def test_shares_are_the_exact_largest_remainder(shares: list[int], batch: int) -> None:
    check_counts([str(share) for share in shares], batch)


@pytest.mark.parametrize(
    ("shares", "batch"),
    [
        (["4", "1", "1", "0", "0"], 8),  # 16/3, 4/3, 4/3: all three remainders are 1/3
        (["0.1", "0.3", "0.2", "0", "0.4"], 5),  # .5, 1.5, 1, 2
        (["0.7", "0.1", "0.1", "0", "0.1"], 15),  # 10.5, 1.5, 1.5, 1.5
    ],
)
def test_ties_go_to_the_earlier_role(shares: list[str], batch: int) -> None:
    check_counts(shares, batch)


@pytest.mark.parametrize("batch", [6, 10, 14, 32])
def test_reference_shares_never_lose_a_role(batch: int) -> None:
    counts = Shares().counts(batch)
    assert sum(counts.values()) == batch
    assert list(counts.values()) == sorted(counts.values(), reverse=True) or not counts["direct"]
    assert {n - batch // 4 for role, n in counts.items() if role != "direct"} <= {0, 1}


def test_a_share_without_a_sample_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"objective\.shares\.fake = .*batch = 3"):
        Shares().counts(3)


@pytest.mark.parametrize("share", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("role", ROLES)
def test_a_share_that_is_no_share_is_refused(role: str, share: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.shares\.{role} .*{share}"):
        Shares(**{role: share})


def test_no_shares_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.shares"):
        Shares(**dict.fromkeys(ROLES, 0.0))


def test_what_a_user_can_cause_is_a_user_error() -> None:
    with pytest.raises(UserError):
        Shares(fake=-1.0)
    with pytest.raises(UserError):
        Shares().counts(3)
    with pytest.raises(UserError):
        Deal(batch=7, micro_batch=2, ranks=1, rank=0)


deals = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@given(deals)
@settings(deadline=None)
def test_a_deal_partitions_the_batch(sizes: tuple[int, int, int]) -> None:
    ranks, micro_batch, accumulation = sizes
    batch = ranks * micro_batch * accumulation
    all_deals = [
        Deal(batch=batch, micro_batch=micro_batch, ranks=ranks, rank=rank) for rank in range(ranks)
    ]
    seen: list[int] = []
    for micro in range(accumulation):
        rows = [deal.mine(micro).tolist() for deal in all_deals]
        assert all(len(mine) == micro_batch and mine == sorted(mine) for mine in rows)
        for deal in all_deals:
            assert deal.micro_steps == accumulation
            assert deal.rows()[micro] == deal.mine(micro).tolist()
            assert sorted(chain(*rows)) == deal.everyone(micro).tolist()
        seen += chain(*rows)
    assert sorted(seen) == list(range(batch))


@given(deals, st.lists(st.integers(1, 6), min_size=5, max_size=5))
@settings(deadline=None)
def test_ranks_hold_the_same_roles_but_at_borders(
    sizes: tuple[int, int, int], shares: list[int]
) -> None:
    ranks, micro_batch, accumulation = sizes
    batch = ranks * micro_batch * accumulation
    counts = largest_remainder([str(share) for share in shares], batch)
    role_of = [role for role in ROLES for _ in range(counts[role])]
    for micro in range(accumulation):
        held = [
            [role_of[i] for i in Deal(batch=batch, micro_batch=micro_batch, ranks=ranks, rank=k)
             .mine(micro).tolist()]
            for k in range(ranks)
        ]  # fmt: skip
        for role in ROLES:
            numbers = [roles.count(role) for roles in held]
            assert max(numbers) - min(numbers) <= 1
        borders = len({role for roles in held for role in roles}) - 1
        assert sum(len(set(position)) > 1 for position in zip(*held, strict=True)) <= borders


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"batch = 12 .*micro_batch x ranks = 4 x 2"):
        Deal(batch=12, micro_batch=4, ranks=2, rank=0)


def step_sums(
    objective: TwinFlow, ranks: int, micro_batch: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Play all ranks in turn and add up [total, gradients...] and the metrics of a step."""
    student, teacher = network(0), network(1)
    parameters = list(student.parameters())
    sums = [torch.zeros((), dtype=torch.float64), *map(torch.zeros_like, parameters)]
    metrics: dict[str, Tensor] = {}

    def add(loss: Loss) -> None:
        for total, value in zip(
            sums, [loss.total.detach(), *gradients(loss.total, parameters)], strict=True
        ):
            total += value
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, torch.zeros(())) + value

    teacher = student if objective.teacher_decay == 0 else teacher
    for rank in range(ranks):
        deal = Deal(batch=8, micro_batch=micro_batch, ranks=ranks, rank=rank)
        step_of_rank(objective, (student, teacher), toy_batch(8, nulls=8), deal, add)
    return sums, metrics


def close(ours: Tensor, theirs: Tensor) -> None:
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_deal_changes_neither_loss_nor_gradient_nor_metrics(name: str) -> None:
    sums, metrics = step_sums(OBJECTIVES[name], 1, 8)
    assert all(bool(value.abs().max() > 0) for value in sums)
    for ranks, micro_batch, accumulation in DEALS[1:]:
        assert ranks * micro_batch * accumulation == 8
        again, told = step_sums(OBJECTIVES[name], ranks, micro_batch)
        for ours, theirs in zip(again, sums, strict=True):
            close(ours, theirs)
        assert told.keys() == metrics.keys()
        for key, value in metrics.items():
            torch.testing.assert_close(told[key], value, rtol=1e-5, atol=1e-9, check_dtype=False)
    torch.testing.assert_close(metrics["loss/total"], sums[0])


class Collective:
    """A velocity that first meets all other ranks, as a sharded one does, and checks the place."""

    def __init__(self, number: int, inner: Velocity, world: World) -> None:
        self.number = number
        self.inner = inner
        self.world = world

    def __call__(self, x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        place = self.world.gather(torch.tensor([self.number, torch.is_grad_enabled()]))
        assert bool((place == place[0]).all()), f"ranks are in different calls: {place.tolist()}"
        return self.inner(x_t, t, r, cond)


def real_rank(world: World, name: str) -> list[Tensor]:
    """Do one rank's share of a step and add it up over the processes."""
    net = network(0)
    networks = (Collective(0, net, world), Collective(1, network(1), world))
    deal = Deal(batch=8, micro_batch=2, ranks=world.size, rank=world.rank)
    totals: list[Tensor] = []

    def add(loss: Loss) -> None:
        totals.append(loss.total.detach())
        loss.total.backward()

    step_of_rank(OBJECTIVES[name], networks, toy_batch(8, nulls=8), deal, add)
    sums = [torch.stack(totals).sum(), *(p.grad for p in net.parameters() if p.grad is not None)]
    for value in sums:
        torch_dist.all_reduce(value)
    return sums


def test_two_real_processes_get_the_same_step() -> None:
    expected, _ = step_sums(OBJECTIVES["crooked"], 1, 8)
    for sums in spawn(real_rank, 2, "crooked"):
        for ours, theirs in zip(sums, expected, strict=True):
            close(ours, theirs)


def test_a_part_of_a_batch_is_its_rows() -> None:
    batch = toy_batch(4, nulls=4)
    part = part_of(batch, torch.tensor([1, 3]))
    assert part.keys == ("1", "3")
    assert part.null.tokens.equal(batch.null.tokens[[1, 3]])
