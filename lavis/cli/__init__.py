"""The console command `lavis` and what the scripts at the root of the repository call.

Each subcommand is a module here with `add_arguments(parser)` and `run(args) -> int`; it is imported only when chosen,
and imports what is heavy inside `run`, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import lavis
from lavis.core.errors import ConfigError, LavisError, did_you_mean

COMMANDS = {
    "train": "train what a recipe says",
    "evaluate": "evaluate the test splits of a recipe",
    "configs": "list, copy, show and check recipes",
    "plan": "whether a recipe fits on given hardware, how it is best laid out, and what a step costs",
    "weights": "list the files a recipe needs, and fetch those that are missing",
    "data": "prepare and inspect datasets",
    "convert": "turn checkpoints of the original and first-generation Qwen folders into files that other tools read",
    "export": "write what a run trained for transformers, peft or the original",
    "chat": "talk with a trained model in the terminal",
    "web": "talk with a trained model in the browser",
    "serve": "answer requests of OpenAI's chat API",
    "demo": "train one linear layer of the shapes world and ask the result about held-out pictures",
    "shapes": "rebuild the small frozen models of the shapes world",
}
"""Subcommand to its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code.

    Errors a user can fix are printed as one message on stderr, without a traceback.
    """
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except LavisError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    parser = _top_parser()
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)
        parser.print_help()
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}.{did_you_mean(name, COMMANDS)} Known: {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"lavis.cli.{name}")
    command = argparse.ArgumentParser(prog=f"lavis {name}", description=COMMANDS[name])
    module.add_arguments(command)
    return module.run(command.parse_args(rest))


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lavis",
        usage="lavis [-h] [--version] COMMAND ...",
        description="Teach a chat LLM to see: one recipe names model, data and run.",
        epilog=f"commands:\n{commands}\n\n`lavis COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lavis {lavis.__version__}")
    return parser
