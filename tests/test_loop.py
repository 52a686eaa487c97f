"""One run from its command line to its last file: stopped, killed, continued, refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.program import Running, refused
from tests.tiny import STEPS, Tiny, checkpoints, curve, lines, steps, tiny, write
from twinflow_train.rng import digest

GOLDEN = Path(__file__).parent / "golden" / "tiny_run.json"
COMPARED = ("base", "rectify", "generator", "local", "jump", "fake", "total")
INTERRUPTED = 75


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed; tests only read it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = run.program.run(*run.words(folder))
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to do something to."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def close(found: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float) -> None:
    """Hold that two curves are the same up to a relative difference of losses and scores.

    The noise floor is made of rounding, which is what differs: its size has to be the same.
    """
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    floor = "health/noise_floor"
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.get(floor, 0) == pytest.approx(theirs.get(floor, 0), rel=0.1), ours["step"]
        rest = {key: value for key, value in theirs.items() if key != floor}
        assert {k: v for k, v in ours.items() if k != floor} == pytest.approx(rest, rel=tolerance)


def wait_for(process: Running, path: Path, text: str = "") -> None:
    """Wait until a running process has written some text into a file."""
    deadline = time.monotonic() + 180
    while not path.exists() or text not in path.read_text():
        assert process.alive, process.wait().err
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.005)


# A whole run


def test_a_run_leaves_what_is_documented(whole: Path) -> None:
    made = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert made >= {"manifest.json", "metrics.jsonl", "checkpoints", "samples", "export"}
    assert checkpoints(whole) == ["step-00000008", "step-00000012"]
    pictures = sorted(path.name for path in (whole / "samples").glob("*.png"))
    assert pictures == [f"step-{step:08d}.png" for step in (0, 4, 8, 12)]
    exported = {path.name for path in (whole / "export" / "transformer").iterdir()}
    assert exported == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_every_step_and_every_evaluation_has_one_line(whole: Path) -> None:
    assert steps(whole) == list(range(STEPS))
    trained = [line for line in lines(whole) if "loss/total" in line]
    for line in trained:
        assert line["samples"] == 8 * line["step"]
        assert {"norm/grad", "lr", "time/step", "memory/peak_gib", "speed/tflops"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
    evaluated = [line for line in lines(whole) if "eval/ema/nfe1/frechet" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8, 12]
    for line in evaluated:
        assert {"eval/raw/nfe2-s1/accuracy", "eval/ema/heldout/jump"} <= line.keys()
        assert not any(key.startswith("eval/base/") for key in line)


def test_the_summary_has_its_documented_form(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert [(row["model"], row["nfe"], row["style"]) for row in summary["results"]] == [
        ("base", 4, "multi"),
        *(("raw", 1, "few"), ("raw", 2, "few")),
        *(("ema", 1, "few"), ("ema", 2, "few")),
    ]
    scores = {"accuracy", "frechet", "diversity", "seconds_per_image"}
    assert all(scores <= row.keys() for row in summary["results"])
    assert (summary["name"], summary["step"]) == ("digits_twinflow", STEPS)
    last = lines(whole)[-1]
    ema = {f"eval/ema/nfe1/{score}": summary["results"][3][score] for score in scores}
    assert ema.items() <= last.items()


def test_the_manifest_says_how_to_make_the_run_again(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["config"]["steps"] == STEPS
    assert manifest["config"]["model"]["rope"] == [2, 2, 4]
    assert "experiment=digits_twinflow" in manifest["command"]
    assert {"ranks", "commit", "libraries", "python"} <= manifest.keys()


def test_the_losses_are_those_on_record(whole: Path) -> None:
    """TWINFLOW_RECORD=1 writes the record anew: only with a reason that the change states."""
    names = [f"loss/{name}" for name in COMPARED] + ["norm/grad"]
    found = {name: [line[name] for line in lines(whole) if "loss/total" in line] for name in names}
    if os.environ.get("TWINFLOW_RECORD") == "1":
        how = "TWINFLOW_RECORD=1 python -m pytest tests/test_loop.py -k on_record"
        GOLDEN.write_text(json.dumps({"recorded by": how, **found}, indent=1) + "\n")
    recorded = json.loads(GOLDEN.read_text())
    for name in names:
        assert found[name] == pytest.approx(recorded[name], rel=1e-5), name


def test_measuring_the_terms_changes_nothing_else(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = run.words(folder, "terms_every=3", "eval_every=0")
    assert run.program.run(*words).code == 0
    measured = [line for line in lines(folder) if "loss/total" in line]
    plain = [line for line in lines(whole) if "loss/total" in line]
    terms = ("norm/base", "norm/fake", "norm/rectify")
    for ours, theirs in zip(measured, plain, strict=True):
        assert ours["loss/total"] == theirs["loss/total"]
        assert ours["norm/grad"] == theirs["norm/grad"]
        assert set(terms) & ours.keys() == (set(terms) if ours["step"] % 3 == 0 else set())
        if ours["step"] % 3 == 0:
            norms = [ours[term] for term in terms]
            assert all(norm > 0 for norm in norms)
            # The triangle inequality, both ways: the three gradients add up to the one.
            assert max(norms) - sum(sorted(norms)[:2]) <= ours["norm/grad"] <= sum(norms) * 1.0001


def test_health_is_told_at_evaluations(whole: Path) -> None:
    told = [line for line in lines(whole) if "health/two_step_gap" in line]
    assert [line["step"] for line in told] == [0, 4, 8, 12]
    assert told[0]["health/teacher_distance"] == 0
    assert told[-1]["health/teacher_distance"] > 0
    assert all(0 < line["health/noise_floor"] < 1e-2 for line in told)  # in float32


def test_a_finished_run_started_again_ends_with_the_same_files(run: Tiny, copy: Path) -> None:
    before = curve(copy)
    assert run.program.run(*run.words(copy)).code == 0
    assert curve(copy) == before


# Stopped and killed


def test_killed_at_twenty_moments_it_ends_the_same(run: Tiny, whole: Path, tmp_path: Path) -> None:
    """Every second time as soon as something is being saved, else at random."""
    runs, kills, saving = 0, 0, 0
    while kills < 20:
        folder = tmp_path / f"run-{runs}"
        process = run.program.start(*run.words(folder, "save_every=1"))
        wait_for(process, folder / "manifest.json")
        if kills % 2:
            died = time.monotonic() + 180
            while process.alive and not list(folder.glob("checkpoints/*.partial")):
                assert time.monotonic() < died
        else:
            time.sleep(digest("kill", kills) % 700 / 1000)
        process.send(signal.SIGKILL)
        killed = process.wait().code == -signal.SIGKILL
        kills += killed
        saving += killed and bool(list(folder.glob("checkpoints/*.partial")))
        if not killed or kills == 20:
            assert run.program.run(*run.words(folder)).code == 0
            assert curve(folder) == curve(whole)
            assert steps(folder) == list(range(STEPS))
            assert sums(folder) == sums(whole)
            runs += 1
    assert saving >= 3, f"only {saving} of {kills} kills met a save"


def sums(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of the last checkpoint's weights, averages and moments."""
    index = json.loads((folder / "checkpoints" / "step-00000012" / "index.json").read_text())
    files: dict[str, str] = index["files"]
    return files


def test_killed_while_saving_it_ends_the_same(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in (4, 8, 12):
        process = run.program.start(*run.words(folder))
        partial = folder / "checkpoints" / f"step-{step:08d}.partial"
        while process.alive and not partial.exists():
            time.sleep(0.0005)
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
    assert run.program.run(*run.words(folder)).code == 0
    assert curve(folder) == curve(whole)
    assert checkpoints(folder) == checkpoints(whole)
    assert sums(folder) == sums(whole)


@pytest.mark.parametrize("damage", ["truncated", "unsealed"])
def test_a_damaged_checkpoint_is_passed_over_and_made_again(
    run: Tiny, whole: Path, copy: Path, damage: str
) -> None:
    newest = copy / "checkpoints" / "step-00000012"
    weights = newest / "rank-00000.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (newest / "COMPLETE").unlink()
    ended = run.program.run(*run.words(copy))
    assert ended.code == 0
    assert "step-00000012, incomplete or damaged: " in ended.err
    assert curve(copy) == curve(whole)
    assert weights.stat().st_size == (
        (whole / "checkpoints" / "step-00000012" / weights.name).stat().st_size
    )


def test_what_dead_runs_left_among_the_checkpoints_is_cleared(run: Tiny, copy: Path) -> None:
    """At full size each is hundreds of gigabytes."""
    saved = copy / "checkpoints"
    shutil.rmtree(saved / "step-00000012")
    shutil.copytree(saved / "step-00000008", saved / "step-00000004")
    (saved / "step-00000004" / "COMPLETE").unlink()  # killed while it was forgotten
    (saved / "step-00000010.partial").mkdir()  # killed while it was saved on a signal
    assert run.program.run(*run.words(copy)).code == 0
    assert checkpoints(copy) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_it_saves_and_can_continue(
    run: Tiny, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    words = run.words(folder, "save_every=0")
    process = run.program.start(*words)
    wait_for(process, folder / "metrics.jsonl", '"step": 2')
    process.send(number)
    ended = process.wait()
    assert ended.code == INTERRUPTED
    assert "Traceback" not in ended.err
    (saved,) = checkpoints(folder)
    assert f"interrupted after step {int(saved[-8:])}" in ended.out
    assert steps(folder) == list(range(int(saved[-8:])))
    assert run.program.run(*words, "resume=must").code == 0
    assert curve(folder) == curve(whole)


def test_a_second_ctrl_c_ends_it_at_once(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = "evals.samplers=[{steps: 2000}]"
    process = run.program.start(*run.words(folder, slow, "evals.images=500"))
    wait_for(process, folder / "samples" / "base" / "results.json")
    process.send(signal.SIGINT)
    time.sleep(0.5)
    assert process.alive
    process.send(signal.SIGINT)
    ended = process.wait(10)
    assert ended.code in (-signal.SIGINT, 130)
    assert "Traceback" not in ended.err


# Ranks


def test_two_ranks_give_the_curve_of_one(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = run.program.run_group(2, *run.words(folder))
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert ended[1].out == ""
    close(curve(folder), curve(whole), 1e-5)


def test_two_ranks_continue_what_one_began(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = run.program.start(*run.words(folder))
    wait_for(process, folder / "metrics.jsonl", '"step": 5')
    process.send(signal.SIGTERM)
    assert process.wait().code == INTERRUPTED
    ended = run.program.run_group(2, *run.words(folder, "resume=must"))
    assert [one.code for one in ended] == [0, 0], ended[0].err
    close(curve(folder), curve(whole), 1e-5)


def test_a_signal_to_one_rank_stops_all(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run.program.group(2, *run.words(folder, "steps=500")) as ranks:
        wait_for(ranks[0], folder / "metrics.jsonl", '"step": 2')
        ranks[1].send(signal.SIGTERM)
        assert [rank.wait().code for rank in ranks] == [INTERRUPTED, INTERRUPTED]
    assert steps(folder) == list(range(len(steps(folder))))


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(run: Tiny, tmp_path: Path) -> None:
    ended = run.program.run_group(2, *run.words(tmp_path / "run", "micro_batch=8"))
    assert [one.code for one in ended] == [2, 2]
    said = [line for one in ended for line in one.errors]
    assert "batch = 8" in said[0]
    assert len(said) == 1 or "rank 1" in said[1], said


# The same folder with something else


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (["seed=1"], ["seed (0 -> 1)"]),
        (["batch=16"], ["batch (8 -> 16)"]),
        (["model.heads=1", "model.head_dim=16", "model.rope=[4,4,8]", "init_from=null"],
         ["model.heads (2 -> 1)", "model.head_dim (8 -> 16)", "init_from"]),
        (["objective.guidance=0.4", "objective.shares.local=2"],
         ["objective.guidance (0.6 -> 0.4)", "objective.shares.local (1.0 -> 2"]),
        (["data.path=other"], ["data.contents"]),
    ],
)  # fmt: skip
def test_a_run_defined_otherwise_is_refused(
    run: Tiny, copy: Path, changes: list[str], keys: list[str]
) -> None:
    if not (run.folder / "other").exists():
        write(run.folder / "other", range(0, 5000, 50), note="!")
    before = curve(copy), (copy / "manifest.json").read_text()
    refused(run.program.run(*run.words(copy, *changes)), "another run", "resume=never", *keys)
    assert (curve(copy), (copy / "manifest.json").read_text()) == before


def test_what_does_not_define_the_run_may_change(run: Tiny, copy: Path) -> None:
    changes = ("steps=14", "optim.lr=1e-3", "log_every=1", "micro_batch=8", "eval_every=0")
    assert run.program.run(*run.words(copy, *changes)).code == 0
    assert steps(copy) == list(range(14))


def test_the_same_data_elsewhere_continue_the_run(run: Tiny, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "train", tmp_path / "moved")
    assert run.program.run(*run.words(copy, f"data.path={tmp_path / 'moved'}")).code == 0


def test_never_resuming_leaves_nothing_of_the_run_before(run: Tiny, copy: Path) -> None:
    changes = ("seed=1", "steps=6", "save_every=2", "eval_every=0")
    old = curve(copy)
    assert run.program.run(*run.words(copy, *changes, "resume=never")).code == 0
    assert steps(copy) == list(range(6))
    assert not any(line in old for line in curve(copy) if "loss/total" in line)
    assert checkpoints(copy) == ["step-00000004", "step-00000006"]
    again = run.program.run(*run.words(copy, *changes, "resume=must"))
    assert again.code == 0, again.err
    assert steps(copy) == list(range(6))


def test_must_resume_needs_something_to_resume(run: Tiny, tmp_path: Path) -> None:
    words = run.words(tmp_path / "run", "resume=must")
    refused(run.program.run(*words), "resume=must", "holds no whole checkpoint")


# Files that are not there, or not what they should be


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["init_from=missing"], ["init_from", "missing", "does not exist"]),
        (["model.heads=1", "model.head_dim=16", "model.rope=[4,4,8]"],
         ["init_from", "attention_head_dim", "16"]),
        (["init_from=train"], ["init_from", "train", "config.json"]),
        (["data.path=missing"], ["data.path", "missing does not exist", "recipe"]),
        (["data.heldout=base"], ["data.heldout", "manifest.json"]),
        (["evals.judge=missing"], ["evals.judge", "missing"]),
        (["model.patch=3", "init_from=null"], ["28x28", "model.patch = 3"]),
        (["model.text_width=9", "init_from=null"], ["model.text_width is 9", "8"]),
        (["folder=base/transformer/config.json"], ["folder", "choose another folder="]),
        (["folder=base/transformer/config.json/run"], ["folder", "choose another folder="]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_clear_line(
    run: Tiny, tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    refused(run.program.run(*run.words(tmp_path / "run", *changes)), *words)


def test_shards_that_go_missing_are_named(run: Tiny, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "train", tmp_path / "train")
    (tmp_path / "train" / "000002.tar").unlink()
    words = run.words(tmp_path / "run", f"data.path={tmp_path / 'train'}")
    refused(run.program.run(*words), "000002.tar is missing")


def test_a_damaged_shard_met_in_training_is_named(run: Tiny, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "train", tmp_path / "train")
    for tar in (tmp_path / "train").glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:-512])
    words = run.words(tmp_path / "run", f"data.path={tmp_path / 'train'}", "evals=none")
    ended = run.program.run(*[word for word in words if not word.startswith("evals.")])
    refused(ended, ".tar", "copy the file again")


def test_two_jobs_in_one_folder_are_refused(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run.program.start(*run.words(folder, "steps=5000"))
    wait_for(first, folder / "metrics.jsonl", '"step": 0')
    refused(run.program.run(*run.words(folder)), str(folder), "another job is running")
    assert first.alive
    first.send(signal.SIGKILL)
    first.wait()
    assert run.program.run(*run.words(folder, "steps=1")).code == 0  # the dead hold no lock


def test_what_only_the_last_evaluation_needs_is_missed_at_the_start(
    run: Tiny, tmp_path: Path
) -> None:
    """A day of training must not end in a missing file that could have been named before it."""
    folder = tmp_path / "run"
    words = run.words(folder, "evals.judge=missing", "eval_every=0", "steps=2")
    refused(run.program.run(*words), "evals.judge", "missing")
    assert not (folder / "metrics.jsonl").exists() or steps(folder) == []


# Evaluation


def test_the_base_is_evaluated_once_and_stands_in_every_summary(run: Tiny, copy: Path) -> None:
    kept = copy / "samples" / "base"
    said = json.loads((kept / "results.json").read_text())
    said["results"][0]["accuracy"] = 0.125  # a mark: no evaluation of 12 images gives it
    (kept / "results.json").write_text(json.dumps(said))
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    assert run.program.run(*run.words(copy)).code == 0
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["results"][0]["accuracy"] == 0.125


def test_evaluated_only_at_the_end_it_still_shows_the_base(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run.program.run(*run.words(folder, "eval_every=0", "steps=2")).code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["model"] for row in summary["results"]] == ["base", "raw", "raw", "ema", "ema"]


# The launcher itself


def test_torchrun_trains_on_two_ranks(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = torchrun(run, *run.words(folder, "steps=2", "save_every=0", "eval_every=0"))
    assert ended.returncode == 0, ended.stderr
    ours = [line["loss/total"] for line in lines(folder) if "loss/total" in line]
    assert ours == pytest.approx(
        [line["loss/total"] for line in lines(whole) if "loss/total" in line][:2], rel=1e-5
    )


def torchrun(run: Tiny, *words: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks with the real launcher."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, "-m", "twinflow_train.train", *words],
        cwd=run.folder,
        env=dict(os.environ) | quiet,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_torchrun_shows_an_error_once_and_no_trace_of_ours(run: Tiny, tmp_path: Path) -> None:
    ended = torchrun(run, *run.words(tmp_path / "run", "steps=0"))
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if "steps must be at least 1" in line]
    assert len(said) == 1 or all("rank" in line for line in said), said
    assert "twinflow_train/run.py" not in ended.stderr
