"""The ablation: equal compute counted exactly, and one tiny variant through the real program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import ablation, one_step
from tests.tiny import Tiny, tiny
from twinflow_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a tiny ablation left, and the command line that made it."""

    run: Path
    out: Path
    docs: Path
    line: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.mark.parametrize(
    ("spent", "budget", "steps", "total"),
    [
        ([4, 4, 4, 4], 12, 3, 12),
        ([4, 4, 4, 4], 13, 3, 12),
        ([4, 4, 4, 4], 14, 3, 12),
        ([4, 4, 4, 4], 15, 4, 16),
        ([3, 9, 1], 7, 1, 3),
        ([3, 9, 1], 9, 2, 12),
        ([30], 9, 1, 30),
    ],
)
def test_steps_are_those_that_come_nearest(
    spent: list[int], budget: int, steps: int, total: int
) -> None:
    assert ablation.nearest(spent, budget) == (steps, total)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        # Each of 8 samples forward and backward, which counts three times.
        (["objective=flow_matching", "objective.guidance=0"], 24),
        # 2 rows generated; 2 x 2 rows local or jump guided twice; only the generator rows, having
        # no kappa, recurse twice; they are rectified twice.
        (["objective.consistency_ratio=0"], 24 + 2 + 4 * 2 + 2 * 2 + 2 * 2),
        (["objective.consistency_ratio=0", "objective.rectify_weight=0"], 24 + 2 + 4 * 2 + 2 * 2),
        # 3 generator, 3 local, 2 jump.
        (["objective=rcgm", "objective.consistency_ratio=0"], 24 + 5 * 2 + 3 * 2),
    ],
)
def test_passes_of_a_step_are_counted(words: list[str], wanted: int) -> None:
    found = ablation.composed(ablation.EXPERIMENT, *words, "batch=8", "micro_batch=4")
    assert ablation.passes(found, 0) == ablation.passes(found, 7) == wanted


def test_every_variant_costs_what_the_full_one_costs() -> None:
    planned = ablation.plan(list(ablation.VARIANTS), [], 12)
    steps, budget = planned["full"]
    assert steps == 12
    assert planned["no L_rectify"][0] > steps > planned["no L_adv"][0]
    for name, (own, total) in planned.items():
        found = ablation.composed(ablation.EXPERIMENT, *ablation.VARIANTS[name])
        assert total == sum(ablation.passes(found, step) for step in range(own))
        # The nearest is at most half of the last or of the next step away.
        assert 2 * abs(total - budget) <= max(ablation.passes(found, k) for k in (own - 1, own))


def test_all_variants_differ_only_in_their_objectives() -> None:
    full = ablation.composed(ablation.EXPERIMENT)
    seen = []
    for words in ablation.VARIANTS.values():
        found = ablation.composed(ablation.EXPERIMENT, *words)
        assert found.objective.guidance == 0.6
        assert found.objective.teacher_decay == full.objective.teacher_decay
        assert (found.optim, found.data, found.init_from, found.batch) == (
            full.optim, full.data, full.init_from, full.batch,
        )  # fmt: skip
        assert found.objective not in seen
        seen.append(found.objective)


@pytest.fixture(scope="module")
def trained(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One variant with one seed, trained by the real program at tiny size."""
    folder = tmp_path_factory.mktemp("ablation")
    kept = ("model.", "init_from", "data.", "evals.judge", "evals.samplers", "batch", "micro_batch")
    words = [word for word in run.words(folder) if word.startswith(kept)]
    docs, found = folder / "docs.md", folder / "found.json"
    docs.write_text(f"a\n{ablation.MARKS[0]}\nold\n{ablation.MARKS[1]}\nz\n")
    named = (f"--folder={folder / 'runs'}", f"--out={found}", f"--docs={docs}")
    options = ["--steps=3", "--seeds=1", "--images=12", "--variant=rcgm", *named]
    assert ablation.main([*options, *words]) == 0
    return Trained(run=folder / "runs" / "rcgm-0", out=found, docs=docs, line=[*options, *words])


def test_a_variant_is_trained_and_scored_by_its_averaged_weights(trained: Trained) -> None:
    (row,) = json.loads(trained.out.read_text())["runs"]
    assert (row["variant"], row["seed"]) == ("rcgm", 0)
    assert row["cpu_seconds"] > 0
    assert row["commit"] == json.loads((trained.run / "manifest.json").read_text())["commit"]
    assert [(result["model"], result["nfe"]) for result in row["results"]] == [
        ("ema", 1), ("ema", 2),
    ]  # fmt: skip
    summary = json.loads((trained.run / "summary.json").read_text())
    words = [word for word in trained.line if not word.startswith("--")]
    assert summary["step"] == row["steps"] == ablation.plan(["rcgm"], words, 3)["rcgm"][0]
    manifest = json.loads((trained.run / "manifest.json").read_text())
    assert {"objective=rcgm", "seed=0", "tracking=none"} <= set(manifest["command"])


def test_what_is_scored_is_not_done_again(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in trained.run.rglob("*") if path.is_file()}

    before = times()
    assert ablation.main(trained.line) == 0
    assert times() == before
    assert ablation.main([*trained.line, "optim.lr=1e-4"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert times() == before


def test_tables_go_to_the_terminal_and_into_the_document(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"--out={trained.out}", f"--docs={trained.docs}"]
    assert ablation.main(["--table", *named]) == 0
    said = capsys.readouterr().out.strip()
    assert said == ablation.tables(json.loads(trained.out.read_text()))
    begin, end = ablation.MARKS
    assert trained.docs.read_text() == f"a\n{begin}\n\n{said}\n\n{end}\nz\n"


def test_the_picture_has_every_run_beside_their_base(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    assert one_step.main([str(trained.run), str(trained.run), f"--out={out}", "--noises=2"]) == 0
    with Image.open(out) as picture:
        # 3 networks of 2 columns and 2 columns between them, 84 + 6 pixels wide, and 10 prompts.
        assert picture.width > 8 * 90
        assert picture.height > 10 * 90
        ours, again = ((picture.width - 90 * k, 0, picture.width - 90 * (k - 2), picture.height)
                       for k in (5, 2))  # fmt: skip
        assert picture.crop(ours).tobytes() == picture.crop(again).tobytes()
        base = (picture.width - 90 * 8, 0, picture.width - 90 * 6, picture.height)
        assert picture.crop(base).tobytes() != picture.crop(ours).tobytes()


def test_a_folder_without_a_run_has_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_step.main([str(tmp_path), f"--out={tmp_path / 'a.png'}"]) == 2
    assert "give folders of runs" in capsys.readouterr().err


def test_tables_show_the_mean_and_the_ends() -> None:
    def row(variant: str, seed: int, accuracy: float | None) -> dict[str, Any]:
        result = {"nfe": 2, "stochasticity": 1.0, "accuracy": accuracy, "frechet": 12.25,
                  "diversity": 1.0}  # fmt: skip
        return {"variant": variant, "seed": seed, "steps": 5, "cpu_seconds": 10.0,
                "results": [result]}  # fmt: skip

    rows = [row("full", 0, 0.9), row("rcgm", 0, 0.5), row("full", 1, 0.8), row("rcgm", 1, None)]
    lines = ablation.tables({"runs": rows, "passes": {"full": 1234, "rcgm": 1230}}).splitlines()
    assert "| full |  | 5 | 1,234 | 10 | 2 |" in lines
    assert "| Prompt accuracy | 2 NFE, stochastic |" in lines
    assert "| full | .850 (.800 to .900) |" in lines
    assert "| full | 12.25 (12.25 to 12.25) |" in lines
    assert any(line.startswith("| rcgm | nan") for line in lines)
    rows[0]["cpu_seconds"] = rows[1]["cpu_seconds"] = rows[3]["cpu_seconds"] = None  # begun before
    lines = ablation.tables({"runs": rows, "passes": {"full": 1234, "rcgm": 1230}}).splitlines()
    assert "| full |  | 5 | 1,234 | 10 | 2 |" in lines
    assert "| rcgm | `objective=rcgm` | 5 | 1,230 |  | 2 |" in lines


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("nothing")
    with pytest.raises(UserError, match="lacks the lines"):
        ablation.insert("x", tmp_path / "a.md")


def test_an_endless_count_ends_at_its_budget() -> None:
    assert ablation.nearest(repeat(5), 500) == (100, 500)
