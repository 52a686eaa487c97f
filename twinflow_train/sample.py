"""Sample: `python -m twinflow_train.sample from=RUN prompts='a red fox' steps=1` draws pictures."""

import sys

from hydra.core.config_store import ConfigStore

from twinflow_train.launch import launch
from twinflow_train.models import families
from twinflow_train.run import GROUPS
from twinflow_train.sampling.settings import Sampling, draw


def register() -> None:
    """Tell Hydra the groups."""
    store = ConfigStore.instance()
    store.store(name="sampling", node=Sampling)
    for group, options in {"model": GROUPS["model"], "encoders": families.OPTIONS}.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)


def sample(settings: Sampling) -> int:
    """Draw, and say what was drawn."""
    print("\n".join(draw(settings)), flush=True)
    return 0


if __name__ == "__main__":
    # `from` is a word of Python, which no field may be called.
    sys.argv[1:] = [
        "from_" + word[4:] if word.startswith("from=") else word for word in sys.argv[1:]
    ]
    launch(sample, config="sample", register=register)
