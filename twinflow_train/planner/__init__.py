"""What a run costs and needs, before it runs: operations, memory, traffic, time, money."""

from twinflow_train.planner.rows import Cost, cost, rows_by_pass

__all__ = ["Cost", "cost", "rows_by_pass"]
