"""Print the two commands of the README's section `## Start`, one per line.

The section must hold exactly two fenced `bash` blocks of exactly one command line each: what a
stranger pastes is what CI runs, so anything else is an error and nothing is printed.
"""

import re
import sys
from pathlib import Path

HEADING = "## Start"


def section(lines: list[str]) -> list[str]:
    """The lines between `## Start` and the next heading of its level or above."""
    body, inside, fenced = [], False, False
    for line in lines:
        fenced ^= line.startswith("```")
        if not fenced and re.match(r"##? ", line):
            if inside:
                break
            inside = line.rstrip() == HEADING
        elif inside:
            body.append(line)
    if not inside:
        sys.exit(f"the README has no section `{HEADING}`")
    return body


def bash_blocks(lines: list[str]) -> list[list[str]]:
    """The lines of each fenced `bash` block."""
    blocks, language = [], None
    for line in lines:
        if line.startswith("```"):
            language = (line.strip("`").strip() or "text") if language is None else None
            if language == "bash":
                blocks.append([])
        elif language == "bash":
            blocks[-1].append(line)
    if language is not None:
        sys.exit(f"`{HEADING}`: a fenced block is not closed")
    return blocks


def main(readme: str) -> None:
    """Check the section of the file `readme` and print its commands."""
    blocks = bash_blocks(section(Path(readme).read_text(encoding="utf-8").splitlines()))
    if len(blocks) != 2:
        sys.exit(f"`{HEADING}` has {len(blocks)} bash blocks; it must have exactly 2")
    for number, block in enumerate(blocks, start=1):
        one_line = len(block) == 1 and block[0].strip()
        if not one_line or block[0].lstrip().startswith("#") or block[0].endswith("\\"):
            sys.exit(f"`{HEADING}`: bash block {number} is not exactly one command line: {block}")
    print("\n".join(block[0].strip() for block in blocks))


if __name__ == "__main__":
    main(*sys.argv[1:])
