"""Print how many tests and doctests of a JUnit report ran; fail unless both are above zero."""

import sys
import xml.etree.ElementTree as ET


def main(report: str) -> None:
    """Count the cases of the file `report` that were not skipped."""
    cases = [case for case in ET.parse(report).iter("testcase") if case.find("skipped") is None]
    doctests = sum(case.get("classname", "").split(".")[0] == "rslora_jax" for case in cases)
    tests = len(cases) - doctests
    print(f"ran: {tests} tests, {doctests} doctests")
    if not tests or not doctests:
        sys.exit("a run without tests or without doctests proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
