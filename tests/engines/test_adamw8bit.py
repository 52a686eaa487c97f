"""AdamW with moments of 8 bits: near AdamW, saved exactly, and continued on any number of ranks.

torchao is installed beside the environment: inside, every import of diffusers would talk about it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tools import IDENTITY, Part, assembled, index_of, state_of
from tests.engines.tools import BATCH, OPTIM, SIZE, State, Trial, fingerprint
from tests.helpers import spawn
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded
from twinflow_train.engines.optim import MOMENTS, AdamW8bit
from twinflow_train.errors import UserError

# One block is as long as a row of most matrices. The last one has 3 rows: over 4 ranks, the last
# rank has none of it.
WIDE = replace(SIZE, layers=1, heads=4, head_dim=64, rope=[16, 24, 24], patch=1)
EIGHT = AdamW8bit(**asdict(OPTIM))
SAVED, END = 2, 4


@dataclass(kw_only=True)
class Life:
    """A run of 8 bits: its state at step SAVED, what it went through, its bits at the end."""

    there: Part
    went: list[float] = field(default_factory=list)
    bits: str = ""


@dataclass(kw_only=True)
class Told:
    """What one rank tells: of its own run, of AdamW's, and of runs resumed, by their ranks."""

    own: Life | None = None
    usual: list[float] = field(default_factory=list)
    resumed: dict[int, Life] = field(default_factory=dict)


def live(world: World, beside: str, top: Path, resume: list[int]) -> Told:
    """Train, save and train on, if the run is not there yet; then resume others."""
    WIDE.build()  # imports diffusers, which would look for torchao
    sys.path.append(beside)
    told, micro = Told(), BATCH // world.size // 2
    trial = Trial.of(micro, optim=EIGHT)
    if world.size < 4:
        usual = Trial.of(micro, optim=OPTIM)
        engine = usual.shard(world, size=WIDE)
        told.usual = go_on(usual, engine, Progress(), world, END)
        engine, progress = trial.shard(world, size=WIDE), Progress()
        went = go_on(trial, engine, progress, world, SAVED)
        told.own = Life(there=state_of(engine, progress), went=went)
        saves = checkpoints(top / str(world.size), engine, progress, world)
        saves.write()
        told.own.went += go_on(trial, engine, progress, world, END)
        told.own.bits = fingerprint(engine)
        saves.finish()
    for ranks in resume:
        engine, progress = trial.shard(world, seed=99, size=WIDE), Progress()
        assert checkpoints(top / str(ranks), engine, progress, world).resume(must=True)
        life = Life(there=state_of(engine, progress))
        life.went = go_on(trial, engine, progress, world, END)
        life.bits = fingerprint(engine)
        told.resumed[ranks] = life
    return told


def checkpoints(folder: Path, engine: Sharded, progress: Progress, world: World) -> Checkpoints:
    return Checkpoints(
        folder=folder, engine=engine, progress=progress, world=world, identity=IDENTITY
    )


def go_on(
    trial: Trial, engine: Sharded, progress: Progress, world: World, until: int
) -> list[float]:
    went = []
    while progress.step < until:
        went.append(trial.learn(engine, progress.step, world)[0])
        progress.advance(BATCH)
    return went


@dataclass(kw_only=True)
class Lives:
    """What the ranks told, by the number of ranks."""

    top: Path
    told: dict[int, list[Told]]

    def own(self, ranks: int) -> list[Life]:
        return [each.own for each in self.told[ranks] if each.own is not None]

    def resumed(self, saved: int, read: int) -> list[Life]:
        return [each.resumed[saved] for each in self.told[read]]


@pytest.fixture(scope="module")
def lives(beside: str, tmp_path_factory: pytest.TempPathFactory) -> Lives:
    found = Lives(top=tmp_path_factory.mktemp("runs"), told={})
    with pytest.MonkeyPatch.context() as env:
        env.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao would compile for minutes
        env.setenv("TWINFLOW_TYPE_HOOK", "0")
        for ranks, resume in ((2, [2]), (1, [1, 2]), (4, [2])):
            found.told[ranks] = spawn(live, ranks, beside, found.top, resume, timeout_seconds=300)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_stay_near_those_of_float32_moments(lives: Lives, ranks: int) -> None:
    usual = lives.told[ranks][0].usual
    for own in lives.own(ranks):
        assert own.went == pytest.approx(usual, rel=2e-4)
        assert own.went != usual


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(
    lives: Lives, ranks: int
) -> None:
    for own, again in zip(lives.own(ranks), lives.resumed(ranks, ranks), strict=True):
        assert again.went == own.went[SAVED:]
        assert again.bits == own.bits


@pytest.mark.parametrize(("saved", "read"), [(1, 1), (2, 2), (2, 1), (2, 4)])
def test_every_code_and_scale_comes_back_on_any_number_of_ranks(
    lives: Lives, saved: int, read: int
) -> None:
    before, after = state(lives.own(saved)), state(lives.resumed(saved, read))
    assert after.keys() == before.keys()
    assert [key for key in after if not torch.equal(after[key], before[key])] == []


@pytest.mark.parametrize(("saved", "read"), [(2, 1), (2, 4)])
def test_a_run_goes_on_alike_on_another_number_of_ranks(
    lives: Lives, saved: int, read: int
) -> None:
    for own, again in zip(lives.own(saved), lives.resumed(saved, read), strict=False):
        assert again.went == pytest.approx(own.went[SAVED:], rel=1e-5)


def state(several: list[Life]) -> State:
    return assembled([life.there for life in several])


@pytest.mark.parametrize("ranks", [1, 2])
def test_most_moments_are_saved_as_bytes(lives: Lives, ranks: int) -> None:
    tensors = index_of(lives.top / str(ranks) / f"step-{SAVED:08d}")["tensors"]

    def numbers(kind: str, dtype: str) -> int:
        entries = [e for key, e in tensors.items() if key.startswith(f"{kind}/")]
        assert {entry["dtype"] for entry in entries} == {dtype}
        return sum(math.prod(entry["shape"]) for entry in entries)

    for kind in MOMENTS:
        codes = numbers(f"{kind}_codes", "torch.uint8")
        assert codes == 256 * numbers(f"{kind}_scales", "torch.float32")
        assert codes > 40 * numbers(kind, "torch.float32")


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'twinflow-train\[lowbit\]'"):
        EIGHT.build([])
