"""Train: `python -m twinflow_train.train experiment=digits_twinflow [key=value ...]`."""

from twinflow_train.launch import launch
from twinflow_train.loop import train

if __name__ == "__main__":
    launch(train)
