"""`lavis web`, also behind webui_demo.py: a model in the browser."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile

from lavis.core.errors import ConfigError
from lavis.serve.arguments import LOOPBACK, add_model_arguments, check_address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis web`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine only; 0.0.0.0: everyone)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument("--share", action="store_true", help="make a public link through gradio.live, good for a week")
    parser.add_argument(
        "--auth",
        action="append",
        default=[],
        metavar="USER:PASSWORD",
        help="ask for this login; may be given several times",
    )
    parser.add_argument(
        "--lang",
        choices=("zh", "en", "auto"),
        default="auto",
        help="language of the page; auto is the browser's (default)",
    )
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="answers generated at once (default 8)")


def run(args: argparse.Namespace) -> int:
    """Load the model and serve the page until Ctrl-C."""
    logins = [_login(text) for text in args.auth]
    if args.max_batch < 1:
        raise ConfigError(f"--max-batch {args.max_batch}: at least one answer at a time.")
    check_address(args.host, args.port)
    if not logins and (args.share or args.host not in LOOPBACK):
        print(
            "warning: whoever reaches this page can use the model: --auth USER:PASSWORD asks for a login.",
            file=sys.stderr,
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the exits below
    # pictures of users: this process's alone, gone with it
    with tempfile.TemporaryDirectory(prefix="lavis-web-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        try:
            from lavis.serve.web import serve_page
        except ModuleNotFoundError as e:
            if e.name != "gradio":
                raise
            raise ConfigError("the web page needs gradio: pip install 'lavis[chat]'.") from e
        from lavis.core.logging import setup_logging
        from lavis.generation.engine import Engine
        from lavis.serve.arguments import open_chat

        setup_logging()
        engine = Engine(open_chat(args), max_batch=args.max_batch)
        try:
            serve_page(
                engine, host=args.host, port=args.port, share=args.share, auth=logins, lang=args.lang, seed=args.seed
            )
        finally:
            engine.close()
    return 0


def _login(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError("--auth takes USER:PASSWORD, such as --auth ada:secret.")
    return user, password
