"""From a command line to a Run, say; what the user can mend becomes one line and exit code 2."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from twinflow_train.dist import ignore_signals
from twinflow_train.errors import UserError
from twinflow_train.run import Run, register
from twinflow_train.scrub import scrub

KILLED_BY_HAND = 130


def launch(
    entry: Callable[[Any], int],
    *,
    config: str = "train",
    register: Callable[[], None] = register,
) -> None:
    """Turn the command line into a live object, hand it to `entry` and exit with its code.

    config: of the defaults in conf/. register: tells Hydra the groups.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra shall raise, not print its own report
    register()

    def app(composed: DictConfig) -> None:
        with _one_line(of_all_ranks=True):
            job = live(composed)
        with _one_line(of_all_ranks=False):
            code = entry(job)
        ignore_signals()
        if code:
            sys.exit(code)

    with _one_line(of_all_ranks=True):
        _refuse_deletions()
        hydra.main(version_base="1.3", config_path=str(_conf()), config_name=config)(app)()


def compose(config: DictConfig) -> Run:
    """Make the live Run of a composed configuration; UserError names a value that is refused."""
    run = live(config)
    assert isinstance(run, Run)
    return run


def live(config: DictConfig) -> Any:
    """Make the live object of a composed configuration; UserError names a value that is refused."""
    _refuse_unknown(config, "")
    try:
        return OmegaConf.to_object(config)
    except (UserError, OmegaConfBaseException):
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def _one_line(*, of_all_ranks: bool) -> Iterator[None]:
    """Print what the user can mend as one line and exit with 2.

    of_all_ranks: every rank fails alike, so rank 0 speaks and the others leave it the time to.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(KILLED_BY_HAND)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank and of_all_ranks:
            time.sleep(2)
        else:
            who = f"rank {rank}: " if rank else ""
            print(f"error: {who}{scrub(_explain(error))}", file=sys.stderr)
        sys.exit(2)


def _conf() -> Path:
    """Find the configuration: inside an installed package, beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "conf"
    return inside if inside.is_dir() else here.parent / "conf"


def _refuse_deletions() -> None:
    """Refuse words that Hydra would read as deleting or naming nothing."""
    for word in sys.argv[1:]:
        if word.startswith(("~", "=")):
            raise UserError(f"cannot use {word!r}: give key=value or group=option")


def _refuse_unknown(node: Any, path: str) -> None:
    """Refuse keys that were added with `+` where no field takes them."""
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            _refuse_unknown(node._get_node(i), f"{path}[{i}]")
    if not isinstance(node, DictConfig) or node._is_missing() or node._is_none():
        return
    kind = OmegaConf.get_type(node)
    allowed = _fields(kind) or [str(key) for key in node]
    for key in map(str, node):
        if key not in allowed:
            raise UserError(_unknown(f"{path}{key}", allowed))
        _refuse_unknown(node._get_node(key), f"{path}{key}.")


def _explain(error: Exception) -> str:
    """Say on one line which key is wrong and what is allowed."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown(str(cause.full_key), _fields(cause.object_type))
    if isinstance(cause, MissingMandatoryValue):
        key = str(cause.full_key).rstrip("_")  # as in from_, which is written from=
        return f"{key} has no value: give {key}=..."
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the word {error.override!r}; quote a value that has special characters: "
            "'key=\"value\"'"
        )
    return " ".join(str(error).split()).partition(" Config search path:")[0]


def _fields(kind: Any) -> list[str]:
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def _unknown(key: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1)
    meant = f", did you mean {near[0]!r}?" if near else "."
    listed = f" Allowed here: {', '.join(allowed)}." if allowed else ""
    return f"unknown key {key!r}{meant}{listed}"
