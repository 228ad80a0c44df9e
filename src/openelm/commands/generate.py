"""openelm generate: continue a prompt, on standard output as it is written."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.infer.engine import Engine, Stream
    from openelm.infer.sampling import Sampling
    from openelm.infer.speculative import Speculation

HELP = "Continue a prompt with a model, streaming the text."
EXAMPLE = 'openelm generate runs/demo --prompt "def main(" --max-tokens 100 --temperature 0.8 --top-p 0.95'

PAGE = re.compile(
    r"(https?://[^/]+|(www\.)?huggingface\.co|hf\.co)/(?!datasets/|spaces/)(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(/(tree|blob|resolve)/(?P<revision>(refs/pr/)?[\w.-]+))?"
)
# Models that another engine runs: what to call them, and what more convert needs to be told.
FOREIGN = {
    "gguf": ("a GGUF file", ""),
    "ollama": ("a folder for Ollama", ""),
    "checkpoint": ("a PyTorch checkpoint", " --tokenizer PATH"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm generate``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its model/ is taken), or Hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: all of standard input)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens at most (default: 256)")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--sliding-window",
        action="store_true",
        help="go on where the model's context is full, with the text's first token and its later half",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )
    add_engine_arguments(parser)
    add_backend_arguments(parser)
    add_draft_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, instead of the text")


def add_sampling_arguments(parser: argparse.ArgumentParser, temperature: float = 0.0, top_p: float = 1.0) -> None:
    """How tokens are chosen; ``read_sampling`` reads it."""
    options: tuple[tuple[str, type, float, str, str], ...] = (
        ("--temperature", float, temperature, "X", "0 is greedy"),
        ("--top-k", int, 0, "K", "only the K likeliest; 0: all"),
        ("--top-p", float, top_p, "P", "only the fewest that reach probability P"),
        ("--min-p", float, 0.0, "P", "only those P times as likely as the likeliest"),
        ("--repetition-penalty", float, 1.0, "X", "above 1: avoid earlier tokens"),
        ("--seed", int, 0, "N", "same seed, same text"),
    )
    for name, kind, default, value, help in options:
        parser.add_argument(name, type=kind, default=default, metavar=value, help=f"{help} (default: {default:g})")


def read_sampling(args: argparse.Namespace) -> Sampling:
    """What the sampling arguments ask for; UserError with every problem found."""
    from openelm.infer.sampling import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is computed; ``load_engine`` reads it."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="compute in this (default: as the weights are)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer for a model without one: file, folder or Hub id"
    )


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Which engine computes, for commands that only write; ``load_engine`` reads it where it is there."""
    parser.add_argument(
        "--backend",
        choices=("auto", "native", "torch"),
        default="auto",
        help="native, the CPU decoder in C++ for bf16 and quantised weights, or torch (default: native if it is there)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step (takes a minute)")


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are drafted (docs/speculative.md); ``load_speculation`` reads it."""
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model with the same tokenizer drafts tokens: same text, fewer passes",
    )
    parser.add_argument(
        "--lookup",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="draft what followed the last N tokens where they stood before (N: 3)",
    )
    parser.add_argument("--draft-tokens", type=int, metavar="K", help="draft at most K tokens a pass (default: 3)")


def load_engine(args: argparse.Namespace) -> Engine:
    """The engine that MODEL, --tokenizer, --dtype, --device, --threads and --backend ask for."""
    from openelm.infer.engine import Engine
    from openelm.interop.hub import TOKENIZER_FILES, tokenizer_help, tokenizer_path
    from openelm.model.folder import DTYPES

    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads} must be at least 1")
    folder = model_folder(args.model)
    if not args.tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise UserError(tokenizer_help(args.model))
    return Engine.load(
        folder,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        device=args.device,
        tokenizer=tokenizer_path(args.tokenizer) if args.tokenizer else None,
        backend=getattr(args, "backend", "torch"),
        threads=args.threads,
        compile=getattr(args, "compile", False),
    )


def check_drafting(args: argparse.Namespace) -> None:
    """UserError where --draft, --lookup and --draft-tokens do not make sense, before anything is loaded."""
    if args.draft is not None and args.lookup is not None:
        raise UserError("--draft and --lookup both draft: give one of them")
    if args.draft_tokens is not None and args.draft is None and args.lookup is None:
        raise UserError(
            f"--draft-tokens {args.draft_tokens} needs something that drafts: add --draft MODEL or --lookup"
        )
    for option, value in (("--draft-tokens", args.draft_tokens), ("--lookup", args.lookup)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1")


def load_speculation(args: argparse.Namespace, engine: Engine) -> Speculation | None:
    """What drafts for the engine; a draft is computed as MODEL is."""
    from openelm.infer.speculative import DRAFT_TOKENS, Speculation, check_vocabulary

    tokens = args.draft_tokens or DRAFT_TOKENS
    if args.draft is None:
        return Speculation(lookup=args.lookup, tokens=tokens) if args.lookup is not None else None
    draft = load_engine(argparse.Namespace(**{**vars(args), "model": args.draft}))
    check_vocabulary(engine.tokenizer, draft.tokenizer)
    sizes = [each.decoder.config.num_parameters() for each in (draft, engine)]
    if sizes[0] > sizes[1]:
        print(
            f"the draft has {sizes[0]:,} parameters, the model {sizes[1]:,}: a draft pays if smaller", file=sys.stderr
        )
    return Speculation(draft.decoder, tokens=tokens)


def model_folder(reference: str) -> Path:
    """The folder that MODEL names, from the Hub where it is there; UserError that says what it is instead."""
    from openelm.interop.hub import model_path
    from openelm.model.folder import find_model_folder

    check_address(reference)
    path = model_path(reference)
    kind = checked_kind(path)
    if kind in FOREIGN:
        what, options = FOREIGN[kind]
        source = shlex.quote(str(path / "model.gguf" if kind == "ollama" else path))
        raise UserError(
            f"{path} is {what}: `openelm convert {source} FOLDER --to hf{options}`, then generate from FOLDER"
        )
    return find_model_folder(path)


def check_address(reference: str) -> None:
    """UserError for the address of a page, with the name that is wanted instead."""
    from urllib.parse import unquote

    page = PAGE.match(unquote(reference))
    if "://" not in reference and (page is None or Path(reference).exists()):
        return
    name = "OWNER/NAME"
    if page is not None:
        revision = page["revision"]
        name = page["repo"] if revision in (None, "main") else f"{page['repo']}@{revision}"
    raise UserError(f"{reference} is an address: give a folder, or a model of the Hugging Face Hub by its name: {name}")


def checked_kind(path: Path) -> str:
    """What stands at a path, by its content: one of FOREIGN, else "". UserError for what is no model by itself."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return ""
        return "ollama" if (path / "Modelfile").is_file() and (path / "model.gguf").is_file() else ""
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give one that is yours to read") from error
    if not start:
        raise UserError(f"{path} is an empty file: copy or download it again, or give another")
    if start.startswith(b"GGUF"):
        return "gguf"
    # safetensors: the length of the header, whose first byte may be anything, then the header, an object in JSON.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise UserError(
            f"{path} is a safetensors file: give its folder, {path.parent}, whose config.json is needed too"
        )
    return "checkpoint" if start.startswith((b"PK\x03\x04", b"\x80")) else ""


def run(args: argparse.Namespace) -> int:
    """Write prompt and completion to standard output, speeds to standard error."""
    from openelm.infer.writing import checked_stops

    sampling = read_sampling(args)
    checked_stops(args.stop)
    check_drafting(args)
    prompt = read_standard_input() if args.prompt is None else args.prompt
    engine = load_engine(args)
    ids = engine.tokenizer.encode(prompt)
    drafts = load_speculation(args, engine)
    stream = engine.stream(ids, args.max_tokens, sampling, args.stop, slide=args.sliding_window, speculation=drafts)
    if args.json:
        print(json.dumps(_as_dict(prompt, "".join(stream), stream, engine, drafts), ensure_ascii=False))
    else:
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
    stream.close()
    print(f"{_speeds(stream)}{_acceptance(drafts)}; {engine.decoder.description}", file=sys.stderr)
    return 0


def read_standard_input() -> str:
    """All of standard input, less the one newline that ``echo`` adds."""
    if sys.stdin.isatty():
        print("reading the prompt from standard input; end it with Ctrl-D", file=sys.stderr)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from error
    return text.removesuffix("\n")


def _as_dict(
    prompt: str, completion: str, stream: Stream, engine: Engine, drafts: Speculation | None
) -> dict[str, object]:
    return {
        "prompt": prompt,
        "completion": completion,
        "finish_reason": stream.finish_reason,
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": len(stream.ids),
        "prefill_s": stream.prefill_s,
        "decode_s": stream.decode_s,
        "decode_tokens_per_s": stream.decode_tokens_per_s,
        "engine": engine.decoder.description,
        "speculation": drafts
        and {
            "drafted": drafts.account.drafted,
            "accepted": drafts.account.accepted,
            "acceptance": drafts.account.acceptance,
            "passes": drafts.account.passes,
            "tokens_per_pass": drafts.account.tokens_per_pass,
        },
    }


def _speeds(stream: Stream) -> str:
    text = f"prompt: {stream.prompt_tokens} tokens, first token after {stream.prefill_s:.3f} s"
    if stream.decode_tokens_per_s is not None:
        text += f"; then {stream.decode_tokens_per_s:.1f} tokens/s"
    return f"{text}; {len(stream.ids)} tokens, finish reason: {stream.finish_reason or 'closed'}"


def _acceptance(drafts: Speculation | None) -> str:
    if drafts is None:
        return ""
    account = drafts.account
    text = f"; {account.accepted} of {account.drafted} drafted tokens accepted"
    return text if account.tokens_per_pass is None else f"{text}, {account.tokens_per_pass:.2f} tokens a pass"
