"""The page on runs: what is on it, and that nothing a run says can get out of its place."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from twinflow_train.errors import UserError
from twinflow_train.reporting import page

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028"


def write_run(folder: Path, *, name: str = "run", steps: int = 20, **config: Any) -> Path:
    """Write what a run leaves: metrics, a manifest, pictures and a summary."""
    (folder / "samples").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            said = {"step": step, "samples": 8 * step, "loss/total": 1 / (1 + step), "lr": 1e-3}
            file.write(json.dumps(said | {"norm/grad": float(step)}) + "\n")
            if step % 10 == 0:
                scores = {f"eval/{w}/nfe1/accuracy": step / steps for w in ("raw", "ema")}
                file.write(json.dumps({"step": step, "samples": 8 * step, **scores}) + "\n")
                Image.new("RGB", (4, 4)).save(folder / "samples" / f"step-{step:08d}.png")
        file.write('{"step": 20, "loss/to')  # killed
    manifest = {"config": {"name": name, "optim": {"lr": 1e-3}, **config}, "ranks": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def end(folder: Path) -> None:
    rows = [
        {"model": "base", "nfe": 30, "steps": 30, "style": "multi", "accuracy": 0.7},
        {"model": "ema", "nfe": 1, "steps": 1, "style": "few", "accuracy": 0.9},
    ]
    summary = {"name": "run", "step": 20, "samples": 160, "results": rows, "real": {"accuracy": 1}}
    (folder / "summary.json").write_text(json.dumps(summary))


def data_of(path: Path) -> dict[str, Any]:
    """Read the data back out of a page."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def lines(data: dict[str, Any], section: str, chart: str) -> dict[str, dict[str, Any]]:
    (charts,) = (one["charts"] for one in data["sections"] if one["title"] == section)
    (found,) = (one["lines"] for one in charts if one["title"] == chart)
    return {line["label"]: line for line in found}


def test_a_run_that_has_not_ended_has_a_page(tmp_path: Path) -> None:
    page.write([write_run(tmp_path / "run")], tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert [one["title"] for one in data["sections"]] == ["Quality", "Losses", "Health", "Others"]
    loss = lines(data, "Losses", "loss/total")["loss/total"]
    assert loss["points"] == [[s, pytest.approx(1 / (1 + s), rel=1e-5)] for s in range(20)]
    assert [one["step"] for one in data["runs"][0]["pictures"]] == [0, 10]
    assert data["results"]["rows"] == []


def test_averages_are_seen_first_and_the_base_is_a_level_line(tmp_path: Path) -> None:
    end(write_run(tmp_path / "run"))
    page.write([tmp_path / "run"], tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    found = lines(data, "Quality", "accuracy")
    assert {label: line["hidden"] for label, line in found.items()} == {
        "raw nfe1": True, "ema nfe1": False, "base nfe30": False,
    }  # fmt: skip
    assert found["base nfe30"]["points"] == [[0, 0.7], [10, 0.7]]
    assert [row[:3] for row in data["results"]["rows"]] == [
        ["run", "base", "30"], ["run", "ema", "1"], ["run", "real", ""],
    ]  # fmt: skip


def test_runs_stand_side_by_side_with_what_differs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name="same", seed=n) for n, name in enumerate("ab")]
    page.write(folders, tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert [run["name"] for run in data["runs"]] == ["same (1)", "same (2)"]
    settings = {row[0]: row[1:] for row in data["settings"]}
    assert settings["seed"] == [0, 1]
    assert settings["optim.lr"] == [1e-3, 1e-3]


def test_nothing_leaves_its_place(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", name=HOSTILE, data={"path": HOSTILE})
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 0, "samples": 0, HOSTILE: 1.0, "text": HOSTILE}) + "\n")
    page.write([folder], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "onerror=alert" not in text.replace(r"\u003cimg src=x onerror", "")
    assert text.count("</script>") == 2
    data = data_of(tmp_path / "page.html")
    assert data["runs"][0]["name"] == HOSTILE
    assert [row[1] for row in data["settings"] if row[0] == "data.path"] == [HOSTILE]


def test_a_page_needs_no_network(tmp_path: Path) -> None:
    page.write([write_run(tmp_path / "run")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)


def test_a_long_run_makes_a_light_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10_000)
    page.write([folder], tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    points = lines(data, "Losses", "loss/total")["loss/total"]["points"]
    assert 200 <= len(points) <= page.POINTS
    assert points[0][1] > points[-1][1]
    steps = [one["step"] for one in data["runs"][0]["pictures"]]
    assert len(steps) == page.PICTURES
    assert steps[-1] == 9990
    assert (tmp_path / "page.html").stat().st_size < 500_000


def test_pictures_are_thinned_until_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", steps=100)
    one = (folder / "samples" / "step-00000000.png").stat().st_size
    monkeypatch.setattr(page, "SMALL_BYTES", one)
    page.write([folder], tmp_path / "page.html", picture_bytes=4 * one)
    steps = [each["step"] for each in data_of(tmp_path / "page.html")["runs"][0]["pictures"]]
    assert len(steps) == 4
    assert steps[-1] == 90


def evaluated(folder: Path, **more: Any) -> Path:
    """Write what an evaluation leaves."""
    folder.mkdir()
    rows = [{"model": HOSTILE, "nfe": 1, "steps": 1, "style": "few", "geneval": 0.875, "dpg": 83.2}]
    said = {"suite": "geneval", "prompts": 553, "images": 4, "results": rows} | more
    (folder / "results.json").write_text(json.dumps(said))
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    return folder


def test_what_evaluations_found_is_read_back(tmp_path: Path) -> None:
    run, found = write_run(tmp_path / "run"), evaluated(tmp_path / "geneval")
    page.write([run], tmp_path / "page.html", evaluations=[found])
    (one,) = data_of(tmp_path / "page.html")["evaluations"]
    assert one["asked"] == "geneval: 553 prompts, 4 of each"
    row = dict(zip(one["head"], one["rows"][0], strict=True))
    assert (row["model"], row["GenEval"], row["DPG"]) == (HOSTILE.replace("\u2028", ""), "0.875",
                                                          "83.2")  # fmt: skip
    assert [picture[:22] for picture in one["pictures"]] == ["data:image/png;base64,"]
    for text in ("{}", "[]", '{"results"'):
        (found / "results.json").write_text(text)
        with pytest.raises(UserError, match=r"--evaluation: .*results\.json was not written by"):
            page.write([run], tmp_path / "page.html", evaluations=[found])


def test_large_pictures_are_shown_smaller(tmp_path: Path) -> None:
    """Eight prompts in nine columns of 1024 pixels are a hundred megabytes."""
    folder = write_run(tmp_path / "run", steps=10)
    draws = np.random.default_rng(0).integers(0, 255, (600, 2400, 3), dtype=np.uint8)
    large = folder / "samples" / "step-00000010.png"
    Image.fromarray(draws).save(large)
    assert large.stat().st_size > page.LIGHT_BYTES
    page.write([folder], tmp_path / "page.html")
    first, last = data_of(tmp_path / "page.html")["runs"][0]["pictures"]
    assert first["png"].startswith("data:image/png;")
    assert last["png"].startswith("data:image/jpeg;")
    with Image.open(BytesIO(base64.b64decode(last["png"].partition(",")[2]))) as shown:
        assert shown.size == (2000, 500)
    assert (tmp_path / "page.html").stat().st_size < large.stat().st_size / 2


def test_pictures_are_made_smaller_before_any_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    draws = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    for path in (folder / "samples").iterdir():
        Image.fromarray(draws).save(path)
    page.write([folder], tmp_path / "page.html", picture_bytes=3 * page.SMALL_BYTES)
    shown = data_of(tmp_path / "page.html")["runs"][0]["pictures"]
    assert [one["step"] for one in shown] == [0, 10, 20]
    sizes = [len(base64.b64decode(one["png"].partition(",")[2])) for one in shown]
    assert max(sizes) <= page.SMALL_BYTES
    assert min(sizes) > page.SMALL_BYTES / 4


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing: .*nowhere is no run's folder"):
        page.write([tmp_path / "nowhere"], tmp_path / "page.html")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: .* cannot be written"):
        page.write([write_run(tmp_path / "run")], tmp_path / "file" / "page.html")
