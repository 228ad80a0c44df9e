"""openelm serve: an OpenAI-compatible server for one model, with a page to talk to it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from openelm.commands.chat import template_text
from openelm.commands.generate import add_backend_arguments, add_engine_arguments, load_engine, model_folder
from openelm.errors import UserError

HELP = "Serve a model: OpenAI's interface at /v1, a page to talk to it at /."
EXAMPLE = "openelm serve runs/demo --port 8000"

KEY_VARIABLE = "OPENELM_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm serve``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its model/ is taken), or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    parser.add_argument("--name", help="what clients call the model (default: its folder's or the Hub's name)")
    parser.add_argument(
        "--api-key-file",
        metavar="PATH",
        help=f"keys that clients may use, one a line, beside {KEY_VARIABLE}; other addresses than 127.0.0.1 need one",
    )
    parser.add_argument(
        "--template", metavar="FILE", help="chat template for a model without one: a Jinja file, plain or handbook"
    )
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="pages from there may ask too")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="texts that advance together (default: 8)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens a text may have (default: the model's)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="texts that may wait (default: 256)")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="for an answer, waiting included (default: 600)"
    )
    parser.add_argument(
        "--grace", type=float, default=30, metavar="SECONDS", help="for running answers after SIGTERM (default: 30)"
    )
    parser.add_argument(
        "--guard", metavar="GUARD", help="FILE.py:FUNCTION or a classifier's FOLDER:LABEL that looks at all texts"
    )
    parser.add_argument("--access-log", action="store_true", help="a line for each request, without its content")
    add_engine_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'openelm-framework[serve]'") from error
    from openelm.interop.source import read_chat_template
    from openelm.serve.guard import load_guard
    from openelm.serve.server import bind, make_server, url
    from openelm.serve.service import Service
    from openelm.serve.settings import Settings
    from openelm.serve.template import ChatTemplate

    settings = Settings(
        slots=args.slots,
        context=args.context,
        queue=args.queue,
        request_s=args.timeout,
        grace_s=args.grace,
        cors=tuple(args.cors),
        keys=read_keys(args.api_key_file),
    )
    guard = load_guard(args.guard) if args.guard else None
    with bind(args.host, args.port, keys=bool(settings.keys)) as listening:  # before the model is loaded: it takes time
        engine = load_engine(args)
        name = args.name or served_name(args.model)
        if args.template:
            text = template_text(args.model, args.template)
        else:
            text = read_chat_template(model_folder(args.model)) or ""  # a base model has none
        template = ChatTemplate(text, engine.tokenizer, f"the chat template of {name}") if text else None
        service = Service(engine, settings, name=name, template=template, guard=guard)
        server = make_server(service, access_log=args.access_log)
        kind = "chat and completions" if template else "completions: a base model, without a chat template"
        print(
            f"{name} at {url(listening)} ({kind}; {engine.decoder.description}; {settings.slots} texts of "
            f"{service.limit} tokens at once)",
            flush=True,
        )
        server.run(sockets=[listening])
    return 0


def served_name(reference: str) -> str:
    """What a model is called that has no other name: the last part of a path that says something, or its Hub id."""
    path = Path(reference)
    if not path.exists():
        return reference
    path = path.resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def read_keys(file: str | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment. UserError for a file without one."""
    keys = [key for key in (os.environ.get(KEY_VARIABLE, "").strip(),) if key]
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file} cannot be read ({error}): give a text, a key a line") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--api-key-file {file} holds no key: write one a line")
        if sys.platform != "win32" and Path(file).stat().st_mode & 0o077:
            print(f"{file} can be read by others on this machine: chmod 600 {file}", file=sys.stderr)
        keys += found
    return tuple(keys)
