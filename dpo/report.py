"""report.html: one self-contained page on a run, for a person who never read the papers.

    python -m dpo.report FOLDER

Works on any run folder (see dpo/pages/folder.py), also of a run that was interrupted or is still going on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.common.errors import UserError
from dpo.pages.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: write the report and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m dpo.report", description="Write report.html of a run folder.")
    parser.add_argument("folder", type=Path, help="output folder of a run")
    try:
        path = write_report(parser.parse_args(arguments).folder)
    except UserError as error:
        sys.stderr.write(f"dpo.report: {error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
