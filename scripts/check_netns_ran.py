"""Fail unless the tests in network namespaces really ran.

    check_netns_ran.py JUNIT_XML

A test there may be skipped only for a named feature that the kernel lacks: its reason starts with
"kernel without ". Says nothing when all is well.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

ALLOWED_SKIP = "kernel without "


def complaints(junit: Path) -> list[str]:
    """What is wrong with the run that wrote `junit`; empty: nothing."""
    root = ET.parse(junit).getroot()  # noqa: S314 - pytest wrote it a moment ago
    cases = [c for c in root.iter("testcase") if c.get("classname", "").startswith("tests.netns")]
    skipped = {case: mark for case in cases if (mark := case.find("skipped")) is not None}
    found = [
        f"{case.get('classname')}.{case.get('name')} was skipped: {mark.get('message')}"
        for case, mark in skipped.items()
        if not (mark.get("message") or "").startswith(ALLOWED_SKIP)
    ]
    if len(cases) == len(skipped):
        found.append(f"no test of tests/netns ran ({len(skipped)} skipped)")
    return found


def main() -> int:
    """Run the check."""
    found = complaints(Path(sys.argv[1]))
    sys.stderr.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
