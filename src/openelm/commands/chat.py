"""openelm chat: talk with a model in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from openelm.commands.generate import (
    add_backend_arguments,
    add_engine_arguments,
    add_sampling_arguments,
    load_engine,
    model_folder,
    read_sampling,
)
from openelm.errors import UserError

HELP = "Talk with a model that was tuned on conversations; /help lists what else can be said."
EXAMPLE = 'openelm chat runs/instruct --system "Answer in one sentence."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm chat``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its model/ is taken), or Hub id")
    parser.add_argument("--system", default="", metavar="TEXT", help="how the model shall behave (default: not said)")
    parser.add_argument(
        "--template", metavar="FILE", help="chat template for a model without one: a Jinja file, plain or handbook"
    )
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer, at most (default: 512)")
    add_sampling_arguments(parser, temperature=0.7, top_p=0.95)
    add_engine_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from openelm.serve.chat_terminal import TerminalChat, say
    from openelm.serve.template import ChatTemplate

    sampling = read_sampling(args)
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens} must be at least 1")
    text = template_text(args.model, args.template)
    engine = load_engine(args)
    say(f"{args.model}: {engine.decoder.description}")
    template = ChatTemplate(text, engine.tokenizer, args.template or f"the chat template of {args.model}")
    TerminalChat(engine, template, sampling, args.max_tokens, args.system).run()
    return 0


def template_text(model: str, chosen: str | None) -> str:
    """The template that --template names, or the model's own; UserError for a model without one."""
    from openelm.data.chat import CHAT_TEMPLATE, HANDBOOK_TEMPLATE
    from openelm.interop.source import read_chat_template

    ours = {"plain": CHAT_TEMPLATE, "handbook": HANDBOOK_TEMPLATE}
    if chosen in ours:
        return ours[chosen]
    if chosen:
        try:
            return Path(chosen).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"--template {chosen}: {reason}: give a Jinja file, plain or handbook") from error
    found = read_chat_template(model_folder(model))
    if not found:
        raise UserError(
            f"{model} has no chat template, so it was not tuned on conversations: continue a text with `openelm "
            f"generate {model}`, or say which one it was tuned with (--template FILE, plain or handbook)"
        )
    return found
