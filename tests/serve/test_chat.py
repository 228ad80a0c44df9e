"""openelm chat: what is typed reaches the model as a conversation, and what it answers is shown, kept and saved."""

import io
import json
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openelm import cli
from openelm.data.chat import CHAT_TEMPLATE, HANDBOOK_TEMPLATE, encode_chat
from openelm.data.pairs import Encoding, Example, TuneSource, read_examples
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.infer.engine import Engine
from openelm.infer.sampling import Sampling
from openelm.infer.torch_decoder import TorchSlots
from openelm.interop.source import read_chat_template
from openelm.serve.chat_terminal import TerminalChat, read_message
from openelm.serve.conversation import Conversation
from openelm.serve.template import ChatTemplate

GREEDY = ["--temperature", "0", "--max-tokens", "8", "--backend", "torch", "--device", "cpu"]
ODD = [
    "",
    " ",
    "\n",
    "</s>",
    "<s>a</s>",
    "<</s>/s>",
    "<unk>",
    "naïve 雨 🙂",
    "<|assistant|>\nyes",
    "  two\n\nlines ",
    "\ufdd0",
]


@pytest.fixture(scope="module")
def tokenizers(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """One tokenizer twice: by sentencepiece, and by tokenizer.json."""
    folder = tmp_path_factory.mktemp("json")
    sentencepiece = Tokenizer.load(tokenizer_file)
    sentencepiece.save(folder)
    return [sentencepiece, Tokenizer.load(folder / "tokenizer.json")]


@pytest.fixture
def talk(
    served_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """``talk("typed\\n", options…)``: what was answered, and the remarks beside it."""

    def run(typed: str, *options: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        assert cli.run(["chat", str(served_folder), *GREEDY, *options]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def answers(engine: Engine, questions: list[str], system: str = "", max_tokens: int = 8) -> list[str]:
    """What the engine says to a conversation, each time from its beginning."""
    turns = [{"role": "system", "content": system}] if system else []
    found = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        ids, _ = encode_chat(engine.tokenizer, turns, add_generation_prompt=True)
        [completion] = engine.generate([ids], max_tokens)
        found.append(completion.text)
        turns.append({"role": "assistant", "content": completion.text})
    return found


# The template


def test_ids_are_those_that_our_models_were_tuned_on(tokenizers: list[Tokenizer]) -> None:
    draw = random.Random(1)
    for tokenizer in tokenizers:
        for text, empty in ((CHAT_TEMPLATE, False), (HANDBOOK_TEMPLATE, True)):
            template = ChatTemplate(text, tokenizer)
            for _ in range(50):
                roles = draw.choices(["user", "assistant", "system"], k=draw.randint(1, 4))
                messages = [{"role": role, "content": draw.choice(ODD) + draw.choice(ODD)} for role in roles]
                ask = draw.random() < 0.5
                wanted, _ = encode_chat(
                    tokenizer, _without_mark(messages), empty_system_turn=empty, add_generation_prompt=ask
                )
                assert template.encode(messages, add_generation_prompt=ask) == wanted


def _without_mark(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """U+FDD0, which Unicode keeps out of texts, is the one character that does not come through."""
    return [{**turn, "content": turn["content"].replace("\ufdd0", "")} for turn in messages]


def test_in_others_templates_special_tokens_are_the_templates_alone(tokenizers: list[Tokenizer]) -> None:
    text = "{% for turn in messages %}<s>[INST] {{ turn.content | trim }} [/INST]</s>{% endfor %}"
    for tokenizer in tokenizers:
        ids = ChatTemplate(text, tokenizer).encode([{"role": "user", "content": " </s><s>after "}])
        assert ids == [tokenizer.bos_id, *tokenizer.encode("[INST] </s><s>after [/INST]"), tokenizer.eos_id]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for turn in messages %}", "is no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "does not take this conversation"),
        ("{{ messages[7].content + 1 }}", "does not take this conversation"),
        ("{% for n in range(10**9) %}x{% endfor %}", "does not take this conversation"),
        ("{% macro deep() %}{{ deep() }}{% endmacro %}{{ deep() }}", "does not take this conversation"),
    ],
)
def test_a_template_can_refuse_and_can_do_no_harm(tokenizers: list[Tokenizer], text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ChatTemplate(text, tokenizers[0]).encode([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("turn", [{"role": "</s>", "content": "a"}, {"role": "user", "content": None}, {}])
def test_a_turn_has_a_known_role_and_text(tokenizers: list[Tokenizer], turn: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"messages\[0\]"):
        ChatTemplate(CHAT_TEMPLATE, tokenizers[0]).encode([turn])


def test_a_template_is_found_in_its_file_or_in_the_older_place(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "older"}))
    assert read_chat_template(tmp_path) == "older"
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert read_chat_template(tmp_path) == "newer"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        read_chat_template(tmp_path)


# The conversation


def words(turns: list[dict[str, str]]) -> list[int]:
    """A prompt with a token for each word."""
    return [hash(word) for turn in turns for word in turn["content"].split()]


def test_the_oldest_turns_make_room_and_the_system_turn_stays() -> None:
    talk = Conversation(words, limit=40, system="be kind")
    for number in range(6):
        ids = talk.ask(f"question {number} of five words", room=8)
        assert len(ids) <= 32 and ids[:2] == words([{"role": "system", "content": "be kind"}])
        assert ids[-5:] == words(talk.turns[-1:])
        talk.answer("a b c")
    # The fifth would make 39 words. Six turns go, so that 15 are left: at most half of 32.
    assert talk.forgotten == 6 and len(talk.messages) == 13


def test_a_message_that_leaves_no_room_is_refused_and_changes_nothing() -> None:
    talk = Conversation(words, limit=40)
    talk.ask("hello", room=10)
    talk.answer("hello")
    with pytest.raises(UserError, match=r"prompt of 31 tokens.* 40 an answer must have 10"):
        talk.ask("word " * 31, room=100)
    assert len(talk.turns) == 2 and talk.forgotten == 0
    assert len(talk.ask("word " * 30, room=100)) == 30 and talk.forgotten == 2


def test_a_question_without_an_answer_is_taken_back() -> None:
    talk = Conversation(words, limit=40)
    talk.ask("hello", room=10)
    talk.answer("")
    assert talk.messages == []


# The terminal


def test_answers_are_those_of_the_engine_and_nothing_else_is_on_standard_output(talk, engine) -> None:
    out, err = talk("After all\n\n/system Be brief.\nmore </s>\\\nlines\n", "--system", "S")
    first = answers(engine, ["After all"], "S")
    [_, second] = answers(engine, ["After all", "more </s>\nlines"], "Be brief.")
    [first] = first
    turns = [("system", "Be brief."), ("user", "After all"), ("assistant", first), ("user", "more </s>\nlines")]
    ids, _ = encode_chat(engine.tokenizer, [{"role": r, "content": c} for r, c in turns], add_generation_prompt=True)
    [second] = engine.generate([ids], 8)
    assert out == f"{first}\n{second.text}\n"
    assert err.count("[8 tokens, ") == 2 and err.count("tokens/s") == 2 and "cut off at max_tokens=8]" in err


def test_what_was_said_is_not_computed_again(talk, monkeypatch) -> None:
    ran: list[int] = []
    prefill = TorchSlots.prefill
    monkeypatch.setattr(
        TorchSlots, "prefill", lambda self, slots, ids: (ran.append(len(ids[0])), prefill(self, slots, ids))[1]
    )
    talk("After all this time\nand\n")
    assert ran[1] < ran[0] + 8, "the whole prompt is the first, its answer and more"


def test_a_conversation_that_outgrows_the_context_goes_on(talk) -> None:
    _, err = talk("one two three four five six\n" * 6, "--system", "S")
    assert err.count("[8 tokens") == 6
    assert "[the context of 128 tokens is full: the oldest " in err


def test_a_saved_conversation_is_read_by_finetune(talk, tmp_path, served_folder) -> None:
    file = tmp_path / "talk.jsonl"
    _, err = talk(f"Hi\nYou\n/save {file}\nMore\n/save {file}\n", "--system", "S")
    assert f"[saved 4 turns in {file}]" in err and f"[saved 6 turns in {file}]" in err
    tokenizer = Tokenizer.load(served_folder)
    [example] = read_examples([TuneSource("talk", str(file), "chat")], tokenizer, Encoding(512)).train
    messages = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in messages] == ["system", *["user", "assistant"] * 3]
    assert (
        isinstance(example, Example) and example.ids.tolist() == encode_chat(tokenizer, messages)[0][: len(example.ids)]
    )
    _, err = talk(f"/save {file}\nHi\n/save {file}\n/save {tmp_path}/talk\n")
    assert "nothing to save yet" in err and "exists, and nothing is overwritten" in err and "must end in .jsonl" in err


def test_settings_change_between_answers_and_wrong_ones_are_refused(talk, engine) -> None:
    changes = ("max_tokens 3\nHi", "temperature=0.5", "top_p 7", "seed 1.5", "heat 1", "max_tokens 0")
    out, err = talk("".join(f"/set {change}\n" for change in changes) + "/reset\nHi\n")
    assert out.startswith(answers(engine, ["Hi"], max_tokens=3)[0] + "\n")
    ids, _ = encode_chat(engine.tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    [sampled] = engine.generate([ids], 3, Sampling(temperature=0.5, top_p=0.95))
    assert out.endswith(f"\n{sampled.text}\n")
    assert "[max_tokens = 3]" in err and "[temperature = 0.5]" in err
    for refused in ("top_p=7.0 must be", "seed=1.5 must be a whole number", "no setting heat", "max_tokens=0 must be"):
        assert refused in err


def test_an_unknown_command_is_not_said_to_the_model(talk, engine) -> None:
    out, err = talk('/hepl\n"""\n/hepl\n"""\n/help\n')
    assert out == answers(engine, ["/hepl"])[0] + "\n"
    assert "there is no /hepl: did you mean /help?" in err and "/save" in err


class Interrupting(io.StringIO):
    """A standard output at whose third piece Ctrl-C is pressed."""

    pieces = 0

    def write(self, text: str) -> int:
        self.pieces += 1
        if self.pieces == 3:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(engine, served_folder, monkeypatch) -> None:
    template = ChatTemplate.load(served_folder, engine.tokenizer)
    assert template is not None
    monkeypatch.setattr(sys, "stdin", io.StringIO("After all\n/set max_tokens 8\nagain\n"))
    monkeypatch.setattr(sys, "stdout", out := Interrupting())
    chat = TerminalChat(engine, template, Sampling(), 50)
    before = signal.getsignal(signal.SIGINT)
    chat.run()
    assert signal.getsignal(signal.SIGINT) is before
    first, second = chat.conversation.turns[1]["content"], chat.conversation.turns[3]["content"]
    assert first and answers(engine, ["After all"], max_tokens=50)[0].startswith(first)
    assert len(engine.tokenizer.encode(first)) < 20
    assert out.getvalue() == f"{first}\n{second}\n"


def test_a_base_model_is_refused_with_what_to_do(served_folder, tmp_path, capsys, monkeypatch) -> None:
    for file in served_folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert cli.run(["chat", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"`openelm generate {tmp_path}`" in error and "--template" in error
    assert cli.run(["chat", str(tmp_path), "--template", str(tmp_path / "none")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert cli.run(["chat", str(tmp_path), *GREEDY, "--template", "handbook"]) == 0
    assert "[8 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hello\n", ("hello", False)),
        ("one\\\ntwo\\\nthree\nnext\n", ("one\ntwo\nthree", False)),
        ("one\\\n", ("one", False)),
        ('"""one"""\n', ("one", False)),
        ('"""\n/one\n\n  two\n"""\nnext\n', ("/one\n\n  two", False)),
        ('"""one\n two""" \n', ("one\n two", False)),
        ('"""never closed\n', ("never closed", False)),
        ("/system one\\\ntwo\n", ("/system one\ntwo", True)),
        (" /no command\n", (" /no command", False)),
    ],
)
def test_messages_of_many_lines(typed: str, message: tuple[str, bool]) -> None:
    lines = iter(typed.splitlines())

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    assert read_message(read) == message
