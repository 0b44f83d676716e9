"""`lavis chat`, also behind cli_demo.py: talk with a trained model in the terminal, or pipe questions in."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import closing
from io import TextIOWrapper
from typing import cast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of cli_demo.py."""
    from lavis.serve.arguments import add_model_arguments

    add_model_arguments(parser)
    parser.add_argument(
        "--image", nargs="+", default=[], metavar="PATH", help="images that the first question is about"
    )
    parser.add_argument("--question", metavar="TEXT", help="print the answer to this and end")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default 512)")
    parser.add_argument("--lang", choices=("zh", "en"), help="language of the messages (default: of the locale)")
    parser.add_argument(
        "--no-markdown", dest="markdown", action="store_false", help="print answers as they are, not typeset"
    )


def run(args: argparse.Namespace) -> int:
    """Talk, or answer what is piped in; 1 if a piped line was an error."""
    from lavis.core.logging import setup_logging
    from lavis.generation.settings import GenerationSettings
    from lavis.serve.screen import Screen
    from lavis.serve.wording import WORDING, default_language

    setup_logging(logging.WARNING)
    # what fails there is shown as the answer's error
    logging.getLogger("lavis.generation.engine").setLevel(logging.CRITICAL)
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")  # what the locale's encoding lacks
    lang = args.lang or default_language()
    screen = Screen(interactive=args.question is None and sys.stdin.isatty(), markdown=args.markdown)
    changes = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    GenerationSettings().with_values(changes)  # a wrong number is refused before the model is loaded
    screen.note(WORDING[lang]["loading"])

    from lavis.generation.engine import Engine
    from lavis.generation.pictures import open_picture
    from lavis.serve.arguments import open_chat
    from lavis.serve.session import ChatSession
    from lavis.serve.terminal import TerminalChat

    pictures = [open_picture(path) for path in args.image]
    chat = open_chat(args)
    with closing(Engine(chat)) as engine:
        terminal = TerminalChat(ChatSession(engine, chat.defaults.with_values(changes), args.seed), screen, lang)
        terminal.attach(pictures)
        if args.question is not None:
            return terminal.answer_lines([args.question])
        if not screen.interactive:
            cast(TextIOWrapper, sys.stdin).reconfigure(errors="replace")
            return terminal.answer_lines(sys.stdin)
        terminal.talk()
    return 0
