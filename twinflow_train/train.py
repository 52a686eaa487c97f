"""Train: `python -m twinflow_train.train experiment=digits_twinflow [key=value ...]`."""

from twinflow_train.loop import train
from twinflow_train.run import launch

if __name__ == "__main__":
    launch(train)
