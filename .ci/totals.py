"""Sum the JUnit reports of a folder; the last line is `N passed, N failed, N skipped`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def main(folder: Path) -> int:
    """Print a row for each report and the totals; 1 where nothing passed or anything failed."""
    passed = failed = skipped = 0
    for report in sorted(folder.glob("*.xml")):
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        seconds = 0.0
        for suite in ET.parse(report).getroot().iter("testsuite"):
            seconds += float(suite.get("time", "0"))
            for name in counts:
                counts[name] += int(suite.get(name, "0"))
        bad = counts["failures"] + counts["errors"]
        good = counts["tests"] - bad - counts["skipped"]
        print(f"{report.stem:24} {good:5} ok {bad:5} bad {counts['skipped']:5} not run {seconds:8.1f} s")
        passed, failed, skipped = passed + good, failed + bad, skipped + counts["skipped"]
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
