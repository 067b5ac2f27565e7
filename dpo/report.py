"""report.html: one self-contained page on a run, for a person who never read the papers.

    python -m dpo.report FOLDER

Works on any run folder (see dpo/pages/folder.py), also on that of an interrupted run or of one that is still going on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.common import command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: write the report and say where it is; 2 after a mistake of the user's, 130 when interrupted."""
    parser = command.Parser(prog="python -m dpo.report", description="Write report.html of a run folder.")
    parser.add_argument("folder", type=Path, help="output folder of a run")
    return command.run("dpo.report", lambda: report(parser.parse_args(arguments).folder))


def report(folder: Path) -> int:
    """Write report.html of `folder` and say on stdout where it is. Raises UserError."""
    from dpo.pages.report import write_report

    sys.stdout.write(f"{write_report(folder)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
