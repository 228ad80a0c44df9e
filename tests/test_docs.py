"""Every command of the documentation runs, shortened where it is long, and does what it promises there.

A line of a code block that begins with `openelm`, and each such command in a sentence, is a test: a new one is covered,
or fails until newcomer.py has what it needs and promises.py says what it is looked at for. Python on the pages, and the
commands of other programs, have tests of their own (tests/interop, tests/test_launch.py).
"""

import argparse
import importlib
import io
import os
import pkgutil
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import pytest
import torch

from loopback_hub import Hub
from newcomer import ROOT, SMALL, shortened, split
from openelm import cli, commands
from openelm.config import load_recipe
from openelm.data.pairs import Encoding, Pair, TuneSource, read_examples
from openelm.data.tokenizer import Tokenizer
from openelm.evaluate import suites, tasks
from openelm.model import geometry
from openelm.model.folder import load_model
from openelm.tuning_config import load_tuning
from promises import PROMISES, Done, entries_of, result_of

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMES = [module.name for module in pkgutil.iter_modules(commands.__path__) if module.name in cli.COMMANDS]
# What stands in a sentence for something of the reader's own.
STANDS_FOR = {
    "RUN": "runs/demo",
    "RUN/tokenizer": "runs/demo/tokenizer",
    "RECIPE": "pretrain-open",
    "MODEL": "runs/demo/model",
    "FILE": "my.jsonl",
    "PROMPTS": "prompts.jsonl",
    "REWARD": "python:reward.py:score",
}
# Commands that cannot run here; their arguments are read all the same.
NOT_RUN = {
    "openelm evaluate --suite all --prefetch": "downloads some 70 data sets, which the loopback Hub does not have",
    # What they do is tested small in tests/bench.
    "openelm bench peers --size 270M --peers ours transformers llama.cpp --group-size 32 --repeats 3 "
    "--environment llama.cpp=$L": "needs a Python with llama-cpp-python",
    "openelm bench peers --size 270M --peers ours llama.cpp --group-size 32 --repeats 5 --quick "
    "--environment llama.cpp=$L": "needs a Python with llama-cpp-python",
    "openelm bench generate --sizes 1.1B --weights bf16 8row 4bit --group-size 32 --one-at-a-time --quick "
    "--repeats 3": "makes a model of 2 GB",
    "openelm bench generate --sizes 270M --weights bf16 8row 4bit --group-size 32 --context 64 1024 --prefill 512 "
    "--repeats 3": "takes minutes, and a context of 1,088 tokens",
    "openelm bench norms --size 270M --quick --repeats 3": "takes minutes",
    "openelm bench generate --sizes 3B --weights bf16 8row 4bit --group-size 32 --one-at-a-time --quick "
    "--repeats 2": "makes a model of 6 GB",
    "openelm bench generate --sizes 1.1B": "makes a model of 2 GB",
    "openelm bench norms": "makes a model of 2 GB",
    "openelm bench peers --peers baselines": "29 GB of models",
    "openelm bench peers --peers baselines --one-at-a-time --quick --repeats 2": "16 GB of models, one by one",
}
# Options of other programs that sentences name.
FOREIGN = {
    "log.md": "--run-path",  # of torchrun, as are some of the next
    "deploy.md": "--init --build-arg --gpus",
    "launch.md": "--nnodes --max-restarts --rdzv-conf --signal --requeue --cpus-per-task",
    "mlx.md": "--ignore-chat-template --test --num-layers --fine-tune-type --dequantize",
}


# What is documented


def commands_of(page: str) -> list[str]:
    """The lines of a page's code blocks that begin with `openelm`, and the commands in its sentences."""
    sentences = re.findall(r"`(openelm [^`]+)`", BLOCK.sub("", PAGES[page]))
    found = [line for line in lines_of(page) if line.startswith("openelm ")]
    return found + [command for command in sentences if not is_mention(command)]


def lines_of(page: str) -> list[str]:
    """The lines of a page's code blocks, those that are continued joined."""
    return re.sub(r" *\\\n +", " ", "\n".join(BLOCK.findall(PAGES[page]))).splitlines()


def mentions_of(page: str) -> list[str]:
    """The commands that a page's sentences only speak of: without their arguments."""
    return [words for words in re.findall(r"`(openelm [^`]+)`", BLOCK.sub("", PAGES[page])) if is_mention(words)]


def is_mention(command: str) -> bool:
    """Whether the words name a command, or its options, and nothing for it to work on."""
    name, *words = split(command)[1:]
    if name not in NAMES:
        return False  # its test says so
    parser = parser_of(name)
    if words and (action := actions_of(parser).get(words[0])):
        parser, words = action, words[1:]
    takes_something = any(not action.option_strings for action in parser._actions)
    if not words:
        return takes_something
    return words[0].startswith("--") and any(not a.option_strings and a.nargs in (None, "+") for a in parser._actions)


def parser_of(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"openelm {name}", exit_on_error=False)
    importlib.import_module(f"openelm.commands.{name}").add_arguments(parser)
    return parser


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a command's actions (`data inspect`, …), where it has any."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def options_of(name: str) -> set[str]:
    parser = parser_of(name)
    return {
        option for one in (parser, *actions_of(parser).values()) for action in one._actions
        for option in action.option_strings
    }  # fmt: skip


DOCUMENTED = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


# Where it runs


@pytest.fixture(scope="module")
def folder(newcomer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newcomer's folder, with more runs and a GGUF file."""
    for package in ("gguf", "lm_eval", "peft"):
        pytest.importorskip(package)
    folder = shutil.copytree(newcomer, tmp_path_factory.mktemp("docs") / "newcomer")
    kept = sorted((folder / "runs" / "demo" / "checkpoints").iterdir())[-1]
    for part in ("model", "tokenizer", f"checkpoints/{kept.name}"):
        shutil.copytree(folder / "runs" / "demo" / part, folder / "runs" / "mine" / part)
    shutil.copytree(folder / "runs" / "mine" / "model", folder / "runs" / "tuned" / "model")
    shutil.copytree(folder / "runs" / "mine" / "model", folder / "runs" / "draft" / "model")
    assert cli.run(["convert", str(folder / "model"), str(folder / "model.gguf"), "--to", "gguf"]) == 0
    return folder


@pytest.fixture(scope="module")
def others(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Models of another family, as their repositories have them: one that writes, one that judges."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.GPTNeoXConfig(**sizes, num_labels=1, pad_token_id=2)
    found = {}
    for name, kind in (
        ("EleutherAI/pythia-410m", transformers.GPTNeoXForCausalLM),
        ("OWNER/REWARD-MODEL", transformers.GPTNeoXForSequenceClassification),
    ):
        torch.manual_seed(0)
        place = tmp_path_factory.mktemp("other")
        kind(config).save_pretrained(place)
        Tokenizer.load(folder / "tokenizer.model").save(place)
        found[name] = files_in(place)
    return found


@pytest.fixture
def published(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub with the models that the pages name, for a user who is called OWNER."""
    model = files_in(folder / "models" / "270M")
    for name in ("apple/OpenELM-270M", "apple/OpenELM-270M-Instruct"):  # have no tokenizer
        hub.add(name, {name: content for name, content in model.items() if not name.startswith("tokenizer")})
    hub.add("NousResearch/Llama-2-7b-hf", {name: model[name] for name in model if name.startswith("tokenizer")})
    hub.add("OWNER/NAME", model).commit("step-5000", model)
    hub.add("OWNER/MODEL", model)
    hub.users["token-of-OWNER"] = "OWNER"
    monkeypatch.setenv("HF_TOKEN", "token-of-OWNER")
    return hub


@pytest.fixture
def here(folder: Path, newcomer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the newcomer's folder, in which a single command runs."""
    here = shutil.copytree(folder, tmp_path / "here", copy_function=os.link)  # nothing is written over in place
    monkeypatch.chdir(here)
    monkeypatch.setenv("OPENELM_CACHE", str(newcomer / "cache"))
    return here


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# Tests


def test_the_pages_have_commands() -> None:
    assert len(DOCUMENTED) >= 40
    assert set(NOT_RUN) <= set(DOCUMENTED)


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda command: command[8:90])
def test_command_does_what_it_promises(
    command: str,
    here: Path,
    published: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    name, *asked = [STANDS_FOR.get(word, word) for word in split(command)[1:]]
    check_names(name, understood(name, asked, monkeypatch))
    if command in NOT_RUN:
        return
    assert name in PROMISES, f"what does `openelm {name}` promise? Say it in PROMISES"
    for repo in {"EleutherAI/pythia-410m", "OWNER/REWARD-MODEL"} & set(asked):
        published.add(repo, request.getfixturevalue("others")[repo])
    if name in ("bench", "convert", "pretrain"):
        monkeypatch.setitem(geometry.SIZES, "270M", SMALL)
    if name in ("pretrain", "finetune", "dpo"):  # to draw takes longer than to run, and `openelm report` has a line too
        monkeypatch.setattr("openelm.report.page.write_report", lambda run, *_: run / "report" / "index.html")
    words = shortened([name, *asked])
    given = understood(name, words[1:], monkeypatch)
    if (made := result_of(name, given)) is not None and made.exists():
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is wet?\n"))  # for those who talk
    if "./classifier:toxic:0.8" in words:
        write_classifier(here / "classifier")
    visits = visited(monkeypatch) if name == "serve" else []
    capsys.readouterr()
    code = cli.run(words)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert name != "serve" or visits == [{"status": "ok"}, 3]
    PROMISES[name](Done(name, given, printed.out, published))


def visited(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Lets the next server be asked for its health and for three tokens, and then stopped as by a signal."""
    from openelm.serve import server as module

    answers: list[object] = []
    make_server, url = module.make_server, module.url

    def visit(server: Any, address: str) -> None:
        try:
            while not server.started:
                time.sleep(0.01)
            answers.append(httpx.get(f"{address}/health").json())
            asked = {"model": server._service.name, "prompt": "What", "max_tokens": 3, "temperature": 0}
            answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=60)
            answers.append(answer.json()["usage"]["completion_tokens"])
        finally:
            server.handle_exit(15, None)

    def make(service: Any, **options: Any) -> Any:
        server = make_server(service, **options)
        run = server.run

        def run_and_visit(sockets: list[Any]) -> None:
            visitor = threading.Thread(target=visit, args=(server, url(sockets[0])))
            visitor.start()
            run(sockets=sockets)
            visitor.join()

        server.run = run_and_visit
        return server

    monkeypatch.setattr(module, "make_server", make)
    return answers


def write_classifier(folder: Path) -> None:
    """A model of another family that tells what is toxic."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    labels = dict(id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1})
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**sizes, **labels, pad_token_id=2)
    ).save_pretrained(folder)
    Tokenizer.load(folder.parent / "tokenizer.model").save(folder)


def understood(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the command line makes of the words, to the last of them."""
    seen: list[argparse.Namespace] = []
    with monkeypatch.context() as patch:
        patch.setattr(f"openelm.commands.{name}.run", lambda given: seen.append(given) or 0)
        assert cli.run([name, *words]) == 0
    return seen[0]


def check_names(name: str, given: argparse.Namespace) -> None:
    """The recipe, its overrides, the suite and the tasks that a command names are there, as it is written."""
    if getattr(given, "recipe", None) and name not in ("ablate", "sweep"):  # which make every config themselves
        (load_tuning if name in ("finetune", "dpo") else load_recipe)(given.recipe, given.overrides)
    if getattr(given, "suite", None):
        assert suites.suite(given.suite)
    if getattr(given, "tasks", None):
        assert tasks.parse(given.tasks)


@pytest.mark.parametrize("page", PAGES)
def test_sentences_name_commands_and_options_that_there_are(page: str) -> None:
    for command in mentions_of(page):
        name, *words = split(command)[1:]
        assert {word for word in words if word.startswith("--")} <= options_of(name), command
    known = {option for name in NAMES for option in options_of(name)} | {"--traceback"}
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", PAGES[page])):
        if code.startswith(("-", "… -")):
            named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code))
            assert named <= known | set(FOREIGN.get(page, "").split()), code


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_within_a_line(page: str) -> None:
    """What follows another word is not run by this file: only torchrun's lines, which tests/test_launch.py parses."""
    hidden = rf".*\S\s+openelm ({'|'.join(cli.COMMANDS)})\b"
    assert [line for line in lines_of(page) if re.match(hidden, line) and not line.startswith("torchrun ")] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", PAGES[page]))
    assert [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()] == []


def test_commands_for_several_ranks_are_understood(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tuning.md; what they do is in tests/tune, and launch.md has a test of its own."""
    lines = [split(line) for line in lines_of("tuning.md") if line.startswith("torchrun ")]
    assert lines
    for words in lines:
        name, *asked = words[words.index("openelm") + 1 :]
        check_names(name, understood(name, asked, monkeypatch))


# tuning.md: what its tables and its Python say


def table_of(page: str, head: str) -> list[list[str]]:
    """The cells of the rows below a table's head."""
    rows = PAGES[page].partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_a_record_of_each_format_is_read(tokenizer_file: Path, tmp_path: Path) -> None:
    rows = table_of("tuning.md", "| format | a record |")
    assert {row[0].strip("`") for row in rows} == set(get_args(get_type_hints(TuneSource)["format"]))
    for number, (form, record, _) in enumerate(rows):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(record.strip("`") + "\n")
        source = TuneSource("page", str(file), form.strip("`"))
        [read] = read_examples([source], Tokenizer.load(tokenizer_file), Encoding(512)).train
        assert isinstance(read, Pair) == (form == "`preference`")


def test_what_is_recorded_is_what_a_run_records(newcomer: Path) -> None:
    pytest.importorskip("peft")
    named = {name for row in table_of("tuning.md", "| entry | what it is |") for name in re.findall(r"`(\w+)`", row[0])}
    runs = (newcomer / "runs" / "docstrings", newcomer / "runs" / "preferences")
    kinds = ("train", "validation", "examples")
    recorded = {key for run in runs for entry in entries_of(run) if entry["kind"] in kinds for key in entry}
    assert named == recorded - {"kind", "step", "timing", "cross_entropy", "z_loss", "pairs", "examples"}


def test_keys_of_recipes_are_there() -> None:
    config = load_tuning("instruct", ["adapter={}"]).model_dump()
    for section, key in re.findall(r"`(data|adapter|preference|train)\.(\w+)", PAGES["tuning.md"]):
        assert key in config[section], f"{section}.{key}"


def test_an_adapter_opens_in_peft_as_the_page_says(here: Path) -> None:
    for package in ("peft", "transformers"):
        pytest.importorskip(package)
    [code] = [code for code in re.findall(r"```python\n(.*?)```", PAGES["tuning.md"], re.DOTALL) if "peft" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    tokens = torch.tensor([[1, 300, 400]])
    merged = load_model("runs/preferences/model")(tokens)
    assert (names["tuned"](tokens).logits - merged).abs().max() < 1e-4
    assert (names["base"](tokens).logits - merged).abs().max() < 1e-4, "peft has put the adapter into it"
