"""The command line: a command's name leads to its module, imported only when it is called; the only exit."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import suppress

from openelm.errors import Stopped, UserError

COMMANDS = {
    "info": "draw a geometry, count its parameters, FLOPs and bytes",
    "tokenizer": "train a tokenizer, or look at one",
    "data": "inspect, count or hash the text of a recipe; its overlap with test sets",
    "plan": "work out memory, time and cost of a run",
    "pretrain": "train a model from a recipe",
    "finetune": "tune a model on examples: conversations, prompts with answers, or text",
    "dpo": "tune a model on preferences (DPO, hinge, IPO)",
    "reject": "make preferences by rejection sampling: candidates, rewards, pairs",
    "merge": "put an adapter's change into the model's own weights",
    "average": "average the last checkpoints of a run into a model",
    "generate": "continue a text",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model over HTTP as OpenAI does, with a page to talk to it",
    "evaluate": "measure models on the paper's suites, or on any task of lm-evaluation-harness",
    "perplexity": "bits per byte and perplexity of any text",
    "convert": "convert a model for transformers, CoreNet, mlx-lm, llama.cpp or Ollama",
    "quantize": "round a model's weights to 4 or 8 bits",
    "push": "publish a run or a model on the Hugging Face Hub",
    "ablate": "train models that differ in how their layers are scaled, and compare them",
    "sweep": "try a grid of settings and find the best by a suite",
    "bench": "measure generation, norms, training and data, beside peers and the machine's roof",
    "report": "draw the report of a run",
    "env": "show versions and hardware",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``openelm``; leaves with 0 done, 2 the user's error, 1 ours, 75 stopped, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from openelm import __version__

        print(f"openelm {__version__}")
        return 0
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    try:
        code = _call(argv[0], argv[1:])
        sys.stdout.flush()  # a reader that has gone is noticed here rather than at exit
        return code
    except UserError as error:
        if show_traceback:
            raise
        message = " ".join(line.strip() for line in str(error).splitlines())
        print(f"openelm {argv[0]}: error: {message}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if show_traceback and stop.__cause__:
            raise
        with suppress(OSError):  # who reads it may be gone; the code still tells
            if str(stop):
                print(f"openelm {argv[0]}: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"openelm {argv[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) left; so do we. What is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def overview() -> str:
    """What ``openelm --help`` prints."""
    lines = ["usage: openelm COMMAND [ARGUMENTS]", "", "Train, measure and run OpenELM models.", "", "commands:"]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    lines += ["", "openelm COMMAND --help explains a command; --traceback shows where an error arose."]
    lines += ["Begin with: openelm pretrain demo"]
    return "\n".join(lines)


def _call(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no such command: did you mean `openelm {near}`? `openelm --help` lists them")
    module = importlib.import_module(f"openelm.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"openelm {name}",
        description=module.HELP,
        epilog=f"example: {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        arguments = parser.parse_intermixed_args(argv)  # overrides may stand behind options
    except TypeError:  # argparse cannot do that where there are sub-commands
        arguments, left = parser.parse_known_args(argv)
        if hasattr(arguments, "overrides") and all("=" in word and not word.startswith("-") for word in left):
            arguments.overrides += left
        elif left:
            parser.error(f"unrecognized arguments: {' '.join(left)}")
    code: int = module.run(arguments)
    return code
