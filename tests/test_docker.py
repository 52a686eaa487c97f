"""The image: what it copies is there, and its versions are ones that the package allows."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TOP = Path(__file__).parent.parent
TEXT = (TOP / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (TOP / "docker" / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def copied() -> list[str]:
    """List what comes from the repository."""
    found = []
    for line in re.findall(r"^COPY (.*)$", TEXT, re.MULTILINE):
        words = shlex.split(line)
        if not words[0].startswith("--from"):
            found += words[:-1]
    return found


def ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out; its last word on a path counts."""
    out = False
    for line in (TOP / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            rule = line.removeprefix("!")
            if fnmatch(path, rule) or path.startswith(f"{rule}/"):
                out = not line.startswith("!")
    return out


@pytest.mark.parametrize("path", copied())
def test_what_is_copied_is_there_and_reaches_the_builder(path: str) -> None:
    assert (TOP / path).exists()
    assert not ignored(path)


def test_nothing_else_reaches_the_builder() -> None:
    kept = {path.name for path in TOP.iterdir() if not ignored(path.name)}
    assert kept == {path.partition("/")[0] for path in copied()} - {"docker"}
    assert ignored("launch/site.sh")


def test_every_dependency_is_pinned_to_a_version_that_is_allowed() -> None:
    extras = PROJECT["optional-dependencies"]["parquet"]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert PINS[requirement.name] in requirement.specifier, requirement


def test_the_image_is_of_a_pinned_base_and_not_of_root() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"docker.io/nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base)
    assert re.findall(r"^USER (\S+)$", TEXT, re.MULTILINE) == ["${UID}"]
    assert "ARG UID=10001" in TEXT
