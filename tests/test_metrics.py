"""Where numbers go: whole lines in a file, cut where a run continues, and W&B without secrets."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from tests.tiny import Tiny, lines, tiny
from twinflow_train import metrics
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.metrics import NoTracking, Sink, Tracking, WandB, cut, open_log

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SECRETS = ("s3cret-user", "s3cret-word", "s3cret-token", "s3cret-sign")
URL = "https://s3cret-user:s3cret-word@host.example/base?token=s3cret-token&X-Signature=s3cret-sign"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


def opened(folder: Path, *, step: int = 0, every: int = 1, world: World = ALONE,
           tracking: Tracking | None = None) -> Any:  # fmt: skip
    return open_log(
        tracking or NoTracking(), name="test", folder=folder, config={}, world=world,
        step=step, steps=9, every=every,
    )  # fmt: skip


def write(path: Path, *steps: int, end: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + end)


def kept(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# Cutting


@pytest.mark.parametrize(
    ("step", "left"), [(0, []), (1, [0, 0]), (2, [0, 0, 1]), (3, [0, 0, 1, 2]), (9, [0, 0, 1, 2])]
)
def test_lines_from_a_step_on_are_cut(tmp_path: Path, step: int, left: list[int]) -> None:
    write(tmp_path / "m.jsonl", 0, 0, 1, 2)
    cut(tmp_path / "m.jsonl", step)
    assert kept(tmp_path / "m.jsonl") == left
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("end", ['{"step": 2, "lo', '{"step": 2}', "\0\0\0", "\n"])
def test_a_damaged_end_is_dropped(tmp_path: Path, end: str) -> None:
    write(tmp_path / "m.jsonl", 0, 1, end=end)
    cut(tmp_path / "m.jsonl", 9)
    assert kept(tmp_path / "m.jsonl") == [0, 1]


def test_bytes_that_are_no_text_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "\xff\xfe')
    cut(path, 9)
    assert kept(path) == [0]


def test_there_may_be_nothing_to_cut(tmp_path: Path) -> None:
    cut(tmp_path / "m.jsonl", 3)
    assert not (tmp_path / "m.jsonl").exists()


# Writing


def test_a_log_continues_where_the_run_stands(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for step in range(4):
            log.stepped(step, 8 * step, {"loss/total": float(step)})
    with opened(tmp_path, step=2) as log:
        log.write(2, 16, {"eval/x": 0.5})
        log.stepped(2, 16, {"loss/total": 7.0})
    assert [(line["step"], line.get("loss/total")) for line in lines(tmp_path)] == [
        *((0, 0.0), (1, 1.0), (2, None), (2, 7.0))
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.write(0, 0, {"a": 1.0})
        assert lines(tmp_path) == [{"step": 0, "samples": 0, "a": 1.0}]


@pytest.mark.parametrize(("every", "left"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (0, [])])
def test_only_every_so_many_steps_are_written(tmp_path: Path, every: int, left: list[int]) -> None:
    with opened(tmp_path, every=every) as log:
        for step in range(5):
            log.stepped(step, step, {})
    assert kept(tmp_path / "metrics.jsonl") == left


def test_what_is_not_finite_is_still_json(tmp_path: Path) -> None:
    """NaN and Infinity are no JSON: other languages' readers stop at such a line."""

    def no(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    with opened(tmp_path) as log:
        log.write(0, 0, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=no)
    assert line["c"] == 1.0


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    other = World(rank=1, size=2, device=torch.device("cpu"))
    with opened(tmp_path, world=other) as log:
        log.write(0, 0, {"a": 1.0})
        log.stepped(0, 0, {})
        log.tell("nothing")
        log.picture(0, "samples", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tracker_gets_all_that_the_file_gets(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    class Spy(Sink):
        def write(self, step: int, values: Any) -> None:
            seen.append((step, dict(values)))

        def picture(self, step: int, name: str, path: Path, *, caption: str = "") -> None:
            seen.append((step, name, path.name, caption))

        def artifact(self, name: str, folder: Path) -> None:
            seen.append((name, folder.name))

        def close(self) -> None:
            seen.append(("closed",))

    class Spying(Tracking):
        def open(self, **_: Any) -> Sink:
            return Spy()

    (tmp_path / "a.png").write_bytes(b"")
    with opened(tmp_path, tracking=Spying()) as log:
        log.stepped(0, 0, {"a": 1.0})
        log.picture(1, "samples", tmp_path / "a.png", caption="ema 1 NFE")
        log.picture(1, "samples", tmp_path / "none.png")
        log.artifact("run", tmp_path)
    assert seen == [
        (0, {"a": 1.0}),
        (1, "samples", "a.png", "ema 1 NFE"),
        ("run", tmp_path.name),
        ("closed",),
    ]


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"tracking\.mode must be offline, online or disabled"):
        WandB(mode="sometimes")


def test_online_without_an_account_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"tracking\.mode=online.*wandb login.*tracking=none"):
        WandB(mode="online").open(name="x", folder=tmp_path, config={})


@pytest.mark.parametrize("answers", [False, True])
def test_without_a_network_an_online_run_goes_on_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answers: bool,
) -> None:
    """Nobody listens there, or somebody who never says a word."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        if answers:
            there.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{there.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(metrics, "PATIENCE_SECONDS", 1)
        with opened(tmp_path, tracking=WandB(mode="online")) as log:
            log.stepped(0, 0, {"loss/total": 1.0})
    assert "W&B cannot be reached" in caplog.text
    assert "tracking goes on offline" in caplog.text
    assert [line["loss/total"] for line in lines(tmp_path)] == [1.0]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_a_tracker_that_fails_in_mid_run_is_told_once_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Lost(Sink):
        def write(self, step: int, values: Any) -> None:
            raise ConnectionError("the network is gone")

    class Losing(Tracking):
        def open(self, **_: Any) -> Sink:
            return Lost()

    with opened(tmp_path, tracking=Losing()) as log:
        for step in range(3):
            log.stepped(step, step, {"loss/total": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert [record.message for record in caplog.records] == [
        "tracking has failed, and ends: the network is gone (metrics.jsonl has all)"
    ]


# A real run with W&B, from a base at a path that is a URL with credentials


@pytest.fixture(scope="module")
def tracked(run: Tiny) -> tuple[Path, str]:
    """Train two steps, tracked; give back the run's folder and what it printed."""
    base = run.folder / Path(URL)  # relative, as the program understands it
    if not base.exists():
        shutil.copytree(run.folder / "base", base)
    folder = run.folder / "tracked"
    words = [word for word in run.words(folder) if not word.startswith("tracking")]
    more = (
        "tracking=wandb",
        "tracking.artifacts=true",
        f"init_from='{URL}'",
        "name='$(touch made); `x` ${seed} \"q\"'",
    )
    ended = run.program.run(*words, *more, "steps=2")
    assert ended.code == 0, ended.err
    return folder, ended.out + ended.err


def test_a_tracked_run_leaves_a_wandb_run_to_sync(tracked: tuple[Path, str]) -> None:
    (file,) = (tracked[0] / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    for word in (b"loss/total", b"eval/ema/nfe1/frechet", b"teacher_decay", b"twinflow"):
        assert word in data
    assert len(list(file.parent.rglob("*.png"))) == 2
    assert b"raw 1 NFE" in data, "the columns of pictures are their captions"
    assert b"diffusion_pytorch_model.safetensors" in data, "the export goes as an artifact"
    commit = json.loads((tracked[0] / "manifest.json").read_text())["commit"]
    assert commit is None or commit.encode() in data
    assert file.name == f"run-{(tracked[0] / 'wandb' / 'id').read_text()}.wandb"


def records(path: Path) -> Iterator[Any]:
    """Read the records of a W&B file: LevelDB's log format behind a header of 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_a_run_that_is_continued_overlays_itself_on_our_own_axis(tmp_path: Path) -> None:
    """Steps 2 and 3 are made twice, by processes with files of their own for one W&B run."""
    for begins in ((0, 1, 2, 3), (2, 3, 4)):
        with opened(tmp_path, step=begins[0], tracking=WandB()) as log:
            for step in begins:
                log.stepped(step, step, {"loss/total": 1.5 * step})
        time.sleep(1.1)  # W&B names its folders by the second
    identity = (tmp_path / "wandb" / "id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    seen, axes = [], set()
    for file in files:
        found = list(records(file))
        rows = [record.history.item for record in found if record.HasField("history")]
        named = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r} for r in rows]
        seen.append([(row["step"], row["loss/total"]) for row in named])
        axes |= {(r.metric.glob_name, r.metric.step_metric) for r in found if r.HasField("metric")}
    assert seen == [[(s, 1.5 * s) for s in (0, 1, 2, 3)], [(s, 1.5 * s) for s in (2, 3, 4)]]
    assert ("*", "step") in axes


def test_the_log_says_what_evaluating_took(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.began -= 100
        log.write(0, 0, {"time/eval": 20.0, "eval/failed": 0.0})
        assert "20.0 s, 20% of the time" in log.evaluated()
        log.write(1, 8, {"time/eval": 30.0, "eval/failed": 1.0})
        assert log.evaluated() == "evaluations took 50.0 s, 50% of the time; 1 of them failed"


def test_no_file_and_no_line_holds_credentials(tracked: tuple[Path, str]) -> None:
    folder, printed = tracked
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    found = [
        f"{secret}: {path.relative_to(folder)}"
        for path in files
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]
    assert not found, "\n".join(found)
    assert not [secret for secret in SECRETS if secret in printed]
    assert "host.example" in (folder / "manifest.json").read_text()


def test_a_name_is_only_a_name(run: Tiny, tracked: tuple[Path, str]) -> None:
    assert not list(run.folder.rglob("made"))
    manifest = json.loads((tracked[0] / "manifest.json").read_text())
    assert manifest["config"]["name"] == '$(touch made); `x` 0 "q"'


def test_errors_do_not_print_credentials(run: Tiny, tmp_path: Path) -> None:
    url = URL.replace("/base", "/missing")
    for key in ("data.path", "data.heldout", "init_from", "evals.judge", "model.layers"):
        words = run.words(tmp_path / "run", "data.attempts=1")
        ended = run.program.run(*words, f"{key}='{url}'")
        assert ended.code == 2, ended.err
        assert len(ended.errors) == 1, ended.err
        assert not [secret for secret in SECRETS if secret in ended.out + ended.err], key
