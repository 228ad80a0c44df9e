"""openelm reject: preferences from a model's own answers, by statistical rejection sampling."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.commands.generate import add_engine_arguments, load_engine, model_folder
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.infer.engine import Engine
    from openelm.infer.sampling import Sampling
    from openelm.tune.rejection import Account, Finished, Prompt

HELP = "Make a preference set: answers of a model, judged by a reward, accepted by rejection sampling, in pairs."
EXAMPLE = "openelm reject runs/mine prompts.jsonl pairs.jsonl --reward python:reward.py:score --samples 64 --accept 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm reject``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its model/ is taken), or Hub id")
    parser.add_argument(
        "prompts", metavar="PROMPTS", help=".jsonl, .json or .parquet with a column of texts or messages"
    )
    parser.add_argument("out", metavar="OUT.jsonl", help="preference set to write, as `openelm dpo` reads it")
    parser.add_argument(
        "--reward",
        required=True,
        metavar="REWARD",
        help="python:FILE.py:FUNCTION or python:MODULE:FUNCTION, called with (prompt, answer) or (prompt, answer, "
        "record); or folder or Hub id of a sequence classifier of transformers",
    )
    parser.add_argument("--reward-label", metavar="NAME", help="the output that is the reward, where there are several")
    parser.add_argument("--prompt-key", default="prompt", metavar="NAME", help="column of PROMPTS (default: prompt)")
    parser.add_argument("--chat", action="store_true", help="texts are a user's turns, put into the instruct template")
    parser.add_argument(
        "--empty-system-turn", action="store_true", help="conversations begin with one, as in the Alignment Handbook"
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="candidates of a prompt (default: 8)")
    parser.add_argument(
        "--accept", type=int, default=2, metavar="N", help="accepted of a prompt, an even number (default: 2)"
    )
    parser.add_argument(
        "--beta", type=float, default=0.5, metavar="X", help="small: the best only; large: any (default: 0.5)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of the candidates (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest (default 0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the fewest that reach probability P (default: 1)"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same pairs (default: 0)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="candidates computed at once (default: 32)")
    parser.add_argument(
        "--keep-candidates", action="store_true", help="leave all candidates with their rewards in OUT.candidates.jsonl"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl; begin anew under other settings")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the account as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate and judge what is not finished yet; accept, pair, write, give account."""
    from openelm.data.records import records
    from openelm.infer.engine import checked_device
    from openelm.train.run_folder import locked
    from openelm.tune.rejection import Finished, at_once, candidates, read_prompts
    from openelm.tune.rewards import open_reward

    sampling, out = checked(args), Path(args.out)
    check_names(args, out)
    found = list(records(args.prompts))
    with locked(out):
        reward, reward_digest = open_reward(args.reward, args.reward_label, checked_device(args.device))
        engine = load_engine(args)
        prompts = read_prompts(
            found,
            engine.tokenizer,
            engine.model.config.max_context_length,
            key=args.prompt_key,
            chat=args.chat,
            empty_system_turn=args.empty_system_turn,
        )
        check_answerable(args, prompts)
        finished = Finished(
            beside(out, "unfinished"),
            settings(args, engine, prompts, reward_digest),
            together=at_once(args.samples, args.batch),
            overwrite=args.overwrite,
        )
        progress = Progress(finished.count, len(prompts))
        for entries in candidates(
            engine,
            prompts,
            reward,
            sampling,
            samples=args.samples,
            max_tokens=args.max_tokens,
            batch=args.batch,
            done=finished.count,
        ):
            finished.add(entries)
            progress.show(finished.count)
        progress.end()
        account = write(args, out, finished, prompts)
        finished.path.unlink()
    print(json.dumps(account.as_dict()) if args.json else shown(account, out))
    return 0


def beside(out: Path, what: str) -> Path:
    """OUT.WHAT.jsonl."""
    return out.with_name(f"{out.stem}.{what}{out.suffix}")


def checked(args: argparse.Namespace) -> Sampling:
    """The sampling; UserError with every number that cannot be."""
    from openelm.infer.sampling import GREEDY_BELOW, Sampling

    rules = (
        ("--samples", args.samples, args.samples >= 2, "at least 2: pairs are made of them"),
        ("--accept", args.accept, args.accept >= 2 and args.accept % 2 == 0, "even and at least 2: it makes pairs"),
        ("--accept", args.accept, args.accept <= max(args.samples, 2), f"at most --samples, which is {args.samples}"),
        ("--beta", args.beta, args.beta > 0, "above 0: towards 0 the best are taken, with a large one any"),
        ("--max-tokens", args.max_tokens, args.max_tokens >= 1, "at least 1"),
        ("--batch", args.batch, args.batch >= 1, "at least 1"),
        (
            "--temperature",
            args.temperature,
            args.temperature >= GREEDY_BELOW,
            f"at least {GREEDY_BELOW:g}: without chance all candidates of a prompt are one",
        ),
    )
    problems = [f"{name} {value} must be {rule}" for name, value, holds, rule in rules if not holds]
    if problems:
        raise UserError("; ".join(problems))
    return Sampling(args.temperature, args.top_k, args.top_p, seed=args.seed)


def check_names(args: argparse.Namespace, out: Path) -> None:
    """UserError where a file to write has a wrong name, or a name that is taken."""
    if out.suffix != ".jsonl":
        raise UserError(f"{out} must end in .jsonl: that is what is written, and how `openelm dpo` knows it")
    mine = [out, beside(out, "candidates"), beside(out, "unfinished")]
    prompts = Path(args.prompts)
    for path in mine:
        if path.is_dir() or (path.exists() and prompts.exists() and path.samefile(prompts)):
            raise UserError(f"{path} is {'a folder' if path.is_dir() else 'PROMPTS'}: choose another name for {out}")
    for path in mine[:2] if args.keep_candidates else mine[:1]:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists: choose another name, or pass --overwrite")


def check_answerable(args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """UserError where there is nothing to generate."""
    if not prompts:
        raise UserError(f"{args.prompts} has no records: give prompts")
    if all(prompt.skipped for prompt in prompts):
        empty = sum(prompt.skipped == "empty" for prompt in prompts)
        raise UserError(
            f"none of the {len(prompts)} prompts of {args.prompts} can be answered: {empty} are empty, "
            f"{len(prompts) - empty} fill the model's context: give others"
        )


def settings(args: argparse.Namespace, engine: Engine, prompts: Sequence[Prompt], reward_digest: str) -> dict[str, Any]:
    """All that the candidates and their rewards depend on."""
    from openelm.model.stored import safetensors_files
    from openelm.train.checkpoint import sha256
    from openelm.tune.rejection import digest_of_prompts

    folder = model_folder(args.model)
    files = [folder / "config.json", *safetensors_files(folder, "model")]
    names = ("samples", "temperature", "top_k", "top_p", "max_tokens", "seed", "chat", "empty_system_turn")
    return {
        "model": [sha256(file) for file in files],
        "dtype": str(engine.model.output_weight.dtype).removeprefix("torch."),
        "tokenizer": engine.tokenizer.fingerprint,
        "prompts": digest_of_prompts(prompts),
        "reward": [args.reward, args.reward_label, reward_digest],
        **{name: getattr(args, name) for name in names},
    }


def write(args: argparse.Namespace, out: Path, finished: Finished, prompts: Sequence[Prompt]) -> Account:
    """Accept and pair; OUT.jsonl, and OUT.candidates.jsonl where it is asked for. UserError where there is no pair."""
    from openelm.files import whole_file
    from openelm.tune.rejection import Account, preferences

    account = Account()
    with ExitStack() as stack:
        paths = [out, beside(out, "candidates")] if args.keep_candidates else [out]
        drafts = [stack.enter_context(whole_file(path, overwrite=args.overwrite)) for path in paths]
        files = [stack.enter_context(draft.open("w", encoding="utf-8")) for draft in drafts]
        for entry, records in preferences(
            finished, prompts, account, samples=args.samples, wanted=args.accept, beta=args.beta, seed=args.seed
        ):
            for file, lines in zip(files, (records, [entry]), strict=False):
                file.writelines(json.dumps(line) + "\n" for line in lines)
        if not account.pairs:
            raise UserError(
                f"no pair is left of {account.candidates} candidates: {account.equal_rewards} pairs had equal rewards, "
                f"{account.too_few_answers} prompts fewer than {args.accept} different answers. The candidates are "
                f"kept in {finished.path}: try a larger --accept or --beta, or give a reward that tells them apart"
            )
    return account


def shown(account: Account, out: Path) -> str:
    """The account in words."""
    left_out = account.empty_prompts + account.long_prompts
    lines = [
        f"prompts     {account.prompts:,}, of which left out: {left_out:,} ({account.empty_prompts:,} empty, "
        f"{account.long_prompts:,} without room for an answer)",
        f"candidates  {account.candidates:,}, mean reward {account.mean_reward:.4g}, standard deviation in a prompt "
        f"{account.reward_spread:.4g}; {account.cut_answers:,} cut by --max-tokens or the context; "
        f"{account.empty_answers:,} empty ones left out",
        f"accepted    {account.accepted:,}, mean reward {account.mean_accepted_reward:.4g}; "
        f"{account.too_few_answers:,} prompts had too few different answers",
        f"pairs       {account.pairs:,}, in {out}; {account.equal_rewards:,} of equal rewards left out",
    ]
    return "\n".join(lines)


class Progress:
    """How far it has come, on standard error: a line that is renewed, where that is a terminal."""

    def __init__(self, done: int, total: int) -> None:
        self._first, self._total, self._start_s = done, total, time.monotonic()
        if done:
            print(f"{done:,} of {total:,} prompts are finished already", file=sys.stderr)

    def show(self, done: int) -> None:
        """Renew the line."""
        if sys.stderr.isatty():
            per_s = (done - self._first) / (time.monotonic() - self._start_s)
            text = f"{done:,} of {self._total:,} prompts, {per_s:.2f} a second"
            print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if sys.stderr.isatty():
            print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)
