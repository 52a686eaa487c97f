"""Finishing a set whose shards are all on record: its manifest, and the list of what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

from twinflow_train.data.manifest import NAME, NULL, About, Manifest
from twinflow_train.encoding.plan import LEFT_OUT, Skipped, read_lines
from twinflow_train.encoding.records import Record
from twinflow_train.encoding.settings import Preparation
from twinflow_train.errors import UserError
from twinflow_train.files import sha256, whole_file
from twinflow_train.models.codec import PipelineFolder
from twinflow_train.place import Place

SKIPPED = "skipped.jsonl"


def has_null(folder: Path) -> bool:
    """Tell whether the null prompt is there and, if there is a manifest, as that says."""
    if not (folder / NULL).exists():
        return False
    try:
        said = Manifest.parse((folder / NAME).read_bytes(), Place.of(folder) / NAME).null_sha256
    except (FileNotFoundError, UserError):  # there is none that could be believed
        return True
    return sha256(folder / NULL) == said


def assemble(
    settings: Preparation, encoders: PipelineFolder, shards: int
) -> tuple[Manifest, list[Skipped]]:
    """Write `skipped.jsonl` and then `manifest.json`; two workers at once write the same.

    Raises:
        UserError: every item was left out.
    """
    folder = Path(settings.folder)
    records = [Record.read(settings.keeping, number) for number in range(shards)]
    skipped = read_lines(settings.keeping / LEFT_OUT)
    skipped += [each for record in records for each in record.skipped]
    skipped.sort(key=lambda each: each.number)
    with whole_file(folder / SKIPPED) as unfinished, unfinished.open("w") as file:
        for each in skipped:
            file.write(json.dumps({"item": each.name, "reason": each.reason}) + "\n")
    written = tuple(record.shard for record in records if record.shard is not None)
    if not written:
        raise UserError(
            f"source.path: none of {len(skipped)} items can be used, {skipped[0].name} because "
            f"{skipped[0].reason}; {folder / SKIPPED} has all"
        )
    for place in (folder, settings.keeping):
        for left_by_a_killed_worker in place.glob("[0-9]*.tmp"):
            left_by_a_killed_worker.unlink(missing_ok=True)
    manifest = Manifest(
        about=About(
            encoder=encoders.name,
            revision=encoders.revision,
            null_prompt=settings.encoders.null_prompt,
            licence=settings.licence,
        ),
        form=records[0].form,
        null_sha256=sha256(folder / NULL),
        shards=written,
    )
    manifest.write(folder)
    return manifest, skipped
