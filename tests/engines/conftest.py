"""What tests of optimizers need that is not part of the environment."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def beside() -> str:
    """Install torchao, of the versions that the package allows, into a folder that stays."""
    project: Any = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["lowbit"]
    folder = Path(sys.prefix, wanted)
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        with tempfile.TemporaryDirectory(dir=sys.prefix) as unfinished:
            site = Path(unfinished, "site")
            command = [*pip, "--retries=1", "--no-deps", f"--target={site}", wanted]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                why = done.stderr.strip().rpartition("\n")[2]
                pytest.skip(f"torchao is not here and cannot be installed: {why}")
            site.rename(folder)
    return str(folder)
