"""`make compose-test`: drive the Compose stack through the loop and what it must survive.

The exit status is 1 when anything is not as it must be. The stack and its volumes are gone afterwards."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.deploy.compose.journey import Journey
from tests.deploy.compose.report import Report
from tests.deploy.compose.stack import Failed, Stack
from tests.deploy.compose.stand_ins import lacking, leave_out


def main() -> int:
    parser = argparse.ArgumentParser(prog="make compose-test", description=__doc__)
    parser.add_argument(
        "--lab", action="store_true", help="with stand-ins for the stores (tests/deploy/compose/lab.yml)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the stack running, to look at it")
    given = parser.parse_args()
    report = Report()
    folder = tempfile.mkdtemp(prefix="medloop-journey-")
    Path(folder).chmod(0o755)  # containers read the images that are drawn there
    absent = lacking() if given.lab else ()
    stack = Stack(Path(folder), lab=given.lab, more=leave_out(absent, Path(folder)))
    try:
        Journey(stack, report, ("mongodb", *absent) if given.lab else ()).drive()
    except Failed as exc:
        report.note("the journey", str(exc), "comes to its end", False)
        report.console.print(stack.compose("logs", "--tail", "30"), highlight=False, markup=False)
    finally:
        if not given.keep:
            stack.down()
    without = f", without {', '.join(absent)}" if absent else ""
    report.show(
        "The Compose stack" + (f", with stand-ins for its stores and base images{without}" if given.lab else "")
    )
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
