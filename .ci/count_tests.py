"""Print how many tests and doctests of a JUnit report ran; fail if there are none of a named kind.

Usage: count_tests.py REPORT KIND..., where KIND is tests or doctests.
"""

import sys
import xml.etree.ElementTree as ET


def main(report: str, *kinds: str) -> None:
    """Count the cases of the file `report` that were not skipped."""
    cases = [case for case in ET.parse(report).iter("testcase") if case.find("skipped") is None]
    doctests = sum(case.get("classname", "").split(".")[0] == "rslora_jax" for case in cases)
    ran = {"tests": len(cases) - doctests, "doctests": doctests}
    print("ran: " + ", ".join(f"{ran[kind]} {kind}" for kind in kinds))
    if not all(ran[kind] for kind in kinds):
        sys.exit(f"a run without {' or '.join(kinds)} proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
