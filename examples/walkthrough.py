"""The articles' simulation of style and facts, reproduced and corrected: run this file.

The same as `rslora walkthrough`, through the library: every table is also there as numbers, for
instance `rslora_jax.analysis.articles.style_facts.errors().to_csv("errors.csv")`.
"""

import sys

from session import exit_on_interrupt

if __name__ == "__main__":  # before the slow imports: Ctrl-C is one line from the start
    exit_on_interrupt("Interrupted: no file is left half-written.")

from pathlib import Path

import tyro

from rslora_jax.analysis.articles.walkthrough import draw, sections


def main(output: Path = Path("outputs/walkthrough.png")) -> None:
    """Print the tables and draw the figure.

    Args:
      output: The figure, a .png file; an older one is replaced.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(output)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for section in sections():
        print(section, end="\n\n")
    print(f"figure: {output}")


if __name__ == "__main__":
    tyro.cli(main)
