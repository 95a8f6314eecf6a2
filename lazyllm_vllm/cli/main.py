"""``lazyllm COMMAND``. A command is a module of this folder with ``add_arguments(parser)`` and
``main(args)``, which imports what is slow only when it runs; its first line of documentation is its
help."""

import argparse
from importlib import import_module

COMMANDS = ("explain",)


def main(arguments: list[str] | None = None) -> None:
    """Run the command that ``arguments`` (None: those of the process) name."""
    parser = argparse.ArgumentParser("lazyllm", description="Tools beside vLLM with LazyLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"lazyllm_vllm.cli.{name}")
        about = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=about, description=about)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    args.main(args)
