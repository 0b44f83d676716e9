"""`lavis serve`: OpenAI's chat API for a trained model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from lavis.serve.arguments import LOOPBACK, add_model_arguments, check_address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis serve`."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("LAVIS_API_KEY"),
        metavar="KEY",
        help="what clients have to send (default: $LAVIS_API_KEY, else none)",
    )
    parser.add_argument("--max-batch", type=int, default=16, help="answers decoded at once (default 16)")
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="questions that may wait; more are refused with 429 (default 256)"
    )
    parser.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from http addresses on this host, or HOST:PORT (may be repeated; default: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; the exit code."""
    from lavis.core.errors import ConfigError

    if missing := [
        name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx") if importlib.util.find_spec(name) is None
    ]:
        raise ConfigError(f"the API needs {', '.join(missing)}: pip install 'lavis[chat]'.")
    for name in ("max_batch", "max_waiting"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1.")
    check_address(args.host, args.port)
    from lavis.core.logging import setup_logging
    from lavis.generation.engine import Engine
    from lavis.serve.arguments import open_chat
    from lavis.serve.server import build_app, serve

    setup_logging()
    engine = Engine(open_chat(args), max_batch=args.max_batch, max_waiting=args.max_waiting)
    if args.host not in LOOPBACK and not args.api_key:
        print(
            f"warning: {args.host} can be reached from other machines, and no --api-key is asked for.", file=sys.stderr
        )
    print(f"{engine.chat.name} answers at http://{args.host}:{args.port}/v1 (Ctrl-C ends)", flush=True)
    serve(build_app(engine, api_key=args.api_key, image_hosts=tuple(args.image_host)), args.host, args.port)
    engine.close()
    return 0
