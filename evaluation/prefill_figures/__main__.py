"""The command line of the prefill figures; see `python -m evaluation.prefill_figures --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.prefill_figures import comparison, latency, needle, recall, stability
from longreach.cli.eval import count, length
from longreach.errors import LongreachError
from longreach.logging import configure

log = logging.getLogger("evaluation.prefill_figures")

_EPILOG = """\
examples:
  python -m evaluation.prefill_figures recall --model models/demo --tokens 8K --out out
  python -m evaluation.prefill_figures stability --model models/demo --prompts 6 --out out
  python -m evaluation.prefill_figures compare --model models/demo --tokens 16K --out out
  python -m evaluation.prefill_figures latency --lengths 8K 32K 128K --out out
  python -m evaluation.prefill_figures needle --lengths 4K 8K --patterns dense adaptive --out out

Each writes NAME.json, NAME.csv and PNG files into the directory named by --out. Patterns are
written as for `longreach up --prefill`; minference takes the model's own patterns.json.
"""
_PATTERNS = ["a_shape", "vertical_slash", "block_sparse", "minference", "adaptive"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks; returns the exit status."""
    configure()
    given = _parse(argv)
    try:
        given.run(given)
    except LongreachError as error:
        log.error("%s", error.message)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.prefill_figures",
        description="The figures that sparse prefill rests on, measured on a model, with plots.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, help: str, run: Callable[[argparse.Namespace], None]
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=help)
        added.add_argument("--model", default="models/demo", help="default %(default)s")
        added.add_argument("--out", type=Path, required=True, metavar="DIR")
        added.set_defaults(run=run)
        return added

    one = command("recall", "mass on the top columns, own and another prompt's", recall.run)
    _prompt_flags(one, prompts=3)
    one.add_argument("--rows", type=count, default=64, help="rows measured (default 64)")
    one.add_argument(
        "--shares", type=float, nargs="+", default=[1 / 64, 1 / 32, 1 / 16, 1 / 8],
        help="shares of the columns kept (default 1/64 to 1/8; the paper's is 1/32)",
    )  # fmt: skip
    one = command("stability", "each head's pattern from prompt to prompt", stability.run)
    _prompt_flags(one, prompts=5)
    _chunk_flags(one)
    one = command("compare", "patterns at equal measured cost", comparison.run)
    _prompt_flags(one, prompts=1)
    _chunk_flags(one)
    one = command("latency", "attention time over length, beside dense", latency.run)
    one.add_argument(
        "--lengths", type=length, nargs="+", default=[4096, 8192, 16384, 32768],
        help="such as 8K 128K (default 4K to 32K)",
    )  # fmt: skip
    one.add_argument("--patterns", nargs="+", default=_PATTERNS, help="default: %(default)s")
    _chunk_flags(one)
    one = command("needle", "needle heatmaps with sparse prefills", needle.run)
    one.add_argument("--lengths", type=length, nargs="+", default=[4096, 8192])
    one.add_argument("--patterns", nargs="+", default=["dense", "minference", "adaptive"])
    one.add_argument("--rounds", type=count, default=1, help="ten depths each (default 1)")
    one.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _prompt_flags(parser: argparse.ArgumentParser, prompts: int) -> None:
    parser.add_argument("--tokens", type=length, default=8192, help="prompt length (default 8K)")
    parser.add_argument("--prompts", type=count, default=prompts, help="default %(default)s")


def _chunk_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunks", type=count, default=4, help="chunks measured (default 4)")
    parser.add_argument("--chunk-rows", type=count, default=2048, help="their rows (default 2048)")


if __name__ == "__main__":
    sys.exit(main())
