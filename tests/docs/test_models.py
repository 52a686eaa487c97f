"""The page on models names what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.families import FAMILIES
from twinflow_train.models.families import OPTIONS
from twinflow_train.run import GROUPS

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def rows(option: str) -> list[str]:
    """List the lines of the two tables of all models that name an option."""
    tables = PAGE[: PAGE.index("## The second time")].splitlines()
    return [line for line in tables if line.startswith("|") and f"`{option}`" in line]


@pytest.mark.parametrize("option", GROUPS["model"])
def test_every_model_has_its_line_in_both_tables(option: str) -> None:
    first, second = rows(option)
    assert f"{GROUPS['model'][option].second.name}`" in second
    assert first != second


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_those_of_the_networks(name: str) -> None:
    for released in FAMILIES[name].released:
        (option,) = (o for o, model in GROUPS["model"].items() if model == released.model)
        stock = released.stock - (384**2 * 1536 if option == "sd35_medium" else 0)
        said = f"{stock / 1e9:.2f}B" if stock > 1e9 else f"{stock / 1e6:.0f}M"
        second = released.second / 1e6
        assert f"| {said} + {second:.0f}M" in rows(option)[0] or f"{second:.1f}M" in rows(option)[0]


@pytest.mark.parametrize("option", ["qwen_image", "sana", "sd35_medium", "z_image"])
def test_where_encoders_are_released_is_said(option: str) -> None:
    assert f"`{option}`: " in PAGE
    assert f"`{OPTIONS[option].path}`" in PAGE
