"""The command line of the observations; see `python -m evaluation.observations --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from evaluation.observations import dump, dynamics, ood, sparsity
from longreach.errors import LongreachError
from longreach.logging import configure

log = logging.getLogger("evaluation.observations")

_EPILOG = """\
examples:
  python -m evaluation.observations dump --model models/demo --tokens 32768 --out out/demo
  python -m evaluation.observations sparsity --dump out/demo --out out/sparsity
  python -m evaluation.observations dynamics --dump out/demo --out out/dynamics
  python -m evaluation.observations ood --source synthetic:structured --n 32768 --out out/ood
  python -m evaluation.observations ood --dump out/demo --layers 2 --out out/ood-demo

Each writes NAME.json, NAME.csv and NAME.png into the directory named by --out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks; returns the exit status."""
    configure()
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.observations",
        description="Measures, on a model's heads or synthetic ones, what retrieval rests on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (dump, sparsity, dynamics, ood):
        command.add_parser(commands)
    given = parser.parse_args(argv)
    try:
        given.run(given)
    except LongreachError as error:
        log.error("%s", error.message)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
