"""Report: `python -m twinflow_train.report outputs/NAME [...]` prints finished runs' results."""

import argparse
import sys
from pathlib import Path

from twinflow_train.errors import UserError
from twinflow_train.reporting.summary import read, table


def main(folders: list[Path]) -> None:
    """Print each run's table and where its picture is."""
    for folder in folders:
        summary = read(folder)
        pictures = sorted((folder / "samples").glob("step-*.png"))
        print(f"{summary['name']}: step {summary['step']:,}, {summary['samples']:,} samples")
        print(table(summary))
        print(f"picture: {pictures[-1] if pictures else 'none'}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    try:
        main(parser.parse_args().runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
