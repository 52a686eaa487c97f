"""Report: `python -m twinflow_train.report RUN [RUN ...]` prints results and writes a page on runs.

The page is one HTML file with curves, pictures by training step, results and settings; it needs no
network. Runs that have not ended are on it too.
"""

import argparse
import sys
from pathlib import Path

from twinflow_train.errors import UserError
from twinflow_train.reporting import page
from twinflow_train.reporting.summary import FILE, read, table


def main(
    folders: list[Path], out: Path | None, evaluations: list[Path], picture_bytes: int
) -> None:
    """Print the table of each run that has ended, and write the page."""
    for folder in folders:
        if (folder / FILE).is_file():
            summary = read(folder)
            print(f"{summary['name']}: step {summary['step']:,}, {summary['samples']:,} samples")
            print(table(summary))
    path = out or folders[0] / "report.html"
    page.write(folders, path, evaluations=evaluations, picture_bytes=picture_bytes)
    print(f"page: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m twinflow_train.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="the page; RUN/report.html of the first run")
    parser.add_argument(
        "--evaluation",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="of twinflow_train.evaluate, to stand on the page too; may be given several times",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        default=page.PICTURE_BYTES / 1e6,
        help="of the pictures of runs, which are made smaller until they fit (%(default)g)",
    )
    words = parser.parse_args()
    try:
        main(words.runs, words.out, words.evaluation, int(1e6 * words.megabytes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
