"""``lazyllm COMMAND ...``: one file a command.

A command's module has a docstring, whose first line is its help, ``add_arguments(parser)`` and
``main(args) -> exit code``. It imports what takes long, vLLM first of all, no sooner than in
``main``: the modules of all commands are imported to parse a command line. One that sets the
parser's default ``takes_others`` finds flags that are not its own, vLLM's, in ``args.others``.
"""

import argparse
import importlib
from collections.abc import Sequence

from lazyllm_vllm import __version__

COMMANDS = {
    "check": "lazyllm_vllm.cli.check",
    "explain": "lazyllm_vllm.cli.explain",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        argv: None: this process's.

    Raises:
        SystemExit: code 2, the command line cannot be read; 0, it asked for help.
    """
    parser = argparse.ArgumentParser("lazyllm", description="LazyLLM for vLLM.")
    parser.add_argument("--version", action="version", version=f"lazyllm-vllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args, others = parser.parse_known_args(argv)
    if others and not getattr(args, "takes_others", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    return args.main(args)
