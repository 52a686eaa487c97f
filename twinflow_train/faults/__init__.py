"""What a run does about bad numbers, ranks that hang, and slow ones: see docs/faults.md."""

from twinflow_train.faults.record import Record
from twinflow_train.faults.safeguards import Safeguards, safeguards
from twinflow_train.faults.settings import Faults
from twinflow_train.faults.watchdog import HUNG

__all__ = ["HUNG", "Faults", "Record", "Safeguards", "safeguards"]
