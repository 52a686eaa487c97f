"""What a worker did and what the set is now, in lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from twinflow_train.encoding.assembling import SKIPPED
from twinflow_train.encoding.job import Outcome
from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.workers import Worker


def lines(outcome: Outcome, settings: Preparation, worker: Worker) -> Iterator[str]:
    """Yield the summary's lines."""
    rate = f" ({outcome.samples / outcome.seconds:.1f} samples/s)" if outcome.samples else ""
    yield (
        f"worker {worker.number + 1} of {worker.count}: {outcome.samples} samples in "
        f"{outcome.shards} shards in {outcome.seconds:.1f} s{rate}"
    )
    if outcome.manifest is None:
        yield (
            f"{settings.folder} is not whole yet: {outcome.left} shards are with other workers; if "
            "these have ended, start again, with any number of workers"
        )
        return
    shards = outcome.manifest.shards
    gigabytes = sum(shard.bytes for shard in shards) / 1e9
    yield (
        f"{settings.folder} is whole: {sum(shard.samples for shard in shards)} samples in "
        f"{len(shards)} shards, {gigabytes:.3g} GB, {len(outcome.skipped)} items left out"
    )
    counts: Counter[tuple[int, ...]] = Counter()
    for shard in shards:
        counts[shard.latent_shape] += shard.samples
    for shape, samples in counts.most_common():
        yield f"  latents of {'x'.join(map(str, shape))}: {samples} samples"
    if outcome.skipped:
        first = outcome.skipped[0]
        yield f"  left out are for example {first.name}: {first.reason}; {SKIPPED} has all"
    if outcome.verified is not None:
        for place, values in outcome.verified.psnr.items():
            if values:
                mean = sum(values) / len(values)
                yield f"  {place}: PSNR {mean:.1f} dB in the mean, {min(values):.1f} at least"
        yield f"  {outcome.verified.picture} shows what was decoded"
