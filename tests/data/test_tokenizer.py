"""Tokenizers: the same ids in every format, whole text back, and conversations as the instruct models saw them."""

import io
import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from openelm.data.chat import CHAT_TEMPLATE, render_chat
from openelm.data.sentencepiece_model import SPACE, read_pieces, read_settings
from openelm.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from openelm.errors import UserError

AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n    def f(x):\n\treturn x\r\n",
    "\t\t\x01\x07\x0b\x0c\x1b\x7f",
    "nul \0 inside",
    "</s> and <s> and <unk> are text here",
    "<0x0A> is six characters",
    f"{SPACE}a marked {SPACE}{SPACE} space",
    "2024 12345 3.14159",
    "Ünïcödé e\u0301 你好，世界 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u202e\ufeff\ufffd",
    "=" * 70 + " " * 301 + "a" * 97,
    "\U0010fffd\ue000",
]


def corpus() -> list[str]:
    """Some 100 kB with the structure of code: words, indentation, numbers, a few foreign characters."""
    draw = random.Random(7)
    words = ["".join(draw.choices("aeiourstlnmd", k=draw.randint(2, 9))) for _ in range(500)]
    lines = ["    " * draw.randint(0, 3) + " ".join(draw.choices(words, k=6)) + f" = {draw.random():.4f}  # é 好\n"] * 2
    for _ in range(1500):
        lines.append("    " * draw.randint(0, 3) + " ".join(draw.choices(words, k=6)) + f"({draw.randint(0, 999)})\n")
    return ["".join(lines[start : start + 50]) for start in range(0, len(lines), 50)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(corpus(), file, 600)
    return file


@pytest.fixture(scope="module")
def small(model_file: Path) -> Tokenizer:
    return Tokenizer.load(model_file)


@pytest.fixture(scope="module")
def llama_file(shared: Path) -> Path:
    return shared / "data" / "llama-tokenizer" / "tokenizer.model"


def byte_level_file(folder: Path, bos: str | None = "<|endoftext|>") -> Path:
    """A tokenizer.json of GPT-2's kind."""
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[bos] if bos else ["<|other|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    byte_level.train_from_iterator(corpus(), trainer)
    file = folder / "tokenizer.json"
    byte_level.save(str(file))
    return file


def golden_texts(shared: Path) -> list[str]:
    lines = (shared / "golden" / "documents.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def random_texts(count: int) -> list[str]:
    draw = random.Random(3)
    alphabets = ["ab ", "aeioust (", "\n\t ", "=-*#", "<s>/0xA", "éß日本\U0001f600", f"{SPACE}a ", "0123456789"]
    return [
        "".join(draw.choices(draw.choice(alphabets) + draw.choice(alphabets), k=draw.randint(1, 40)))
        for _ in range(count)
    ]


# Encoding and decoding


def test_llama_ids_are_sentencepieces_own(llama_file: Path, shared: Path) -> None:
    ours = Tokenizer.load(llama_file)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (32000, 1, 2, None)
    assert ours.encode("Hello world") == [15043, 3186]
    for text in golden_texts(shared) + AWKWARD:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)


def test_llama_tokenizer_json_gives_sentencepieces_ids(llama_file: Path, shared: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(llama_file)
    ours.save(tmp_path)
    converted = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (converted.vocab_size, converted.bos_id, converted.eos_id) == (32000, 1, 2)
    for text in golden_texts(shared) + AWKWARD + random_texts(2000):
        ids = ours.encode(text)
        assert converted.encode(text) == ids
        assert converted.decode(ids) == ours.decode(ids)


def test_own_model_and_its_tokenizer_json_agree(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    converted = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in AWKWARD + random_texts(2000) + corpus():
        assert converted.encode(text) == small.encode(text)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("dummy", [True, False])
def test_other_sentencepiece_settings_survive_conversion(rule: str, dummy: bool, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name=rule,
        add_dummy_prefix=dummy,
        remove_extra_whitespaces=rule == "nmt_nfkc",
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    original = Tokenizer.load(tmp_path / "a.model")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    original.save(tmp_path)
    converted = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in ["  two  spaces ", "ﬁne ①½", "tab\tand\nline", *corpus()[:3]]:
        ids = theirs.encode(text)
        assert original.encode(text) == ids
        assert converted.encode(text) == ids
        assert original.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_comes_back(small: Tokenizer, text: str) -> None:
    # SentencePiece writes a space as U+2581, so that character alone cannot come back as itself.
    assert small.decode(small.encode(text)) == text.replace(SPACE, " ")


def test_newline_is_the_byte_piece(small: Tokenizer) -> None:
    assert [small.piece(id) for id in small.encode("a\n")][-1] == "<0x0A>"
    assert small.piece(small.bos_id) == "<s>"
    with pytest.raises(IndexError, match="600"):
        small.piece(600)


def test_special_and_filler_ids_decode_to_nothing(small: Tokenizer) -> None:
    ids = small.encode("one two")
    assert small.decode([small.bos_id, 0, *ids, 100_000, small.eos_id]) == "one two"


def test_half_a_surrogate_pair_does_not_stop_encoding(small: Tokenizer, tmp_path: Path) -> None:
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"
    byte_level = Tokenizer.load(byte_level_file(tmp_path))
    assert byte_level.decode(byte_level.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_stream_joined_is_decode_and_holds_back_half_characters(kind: str, small: Tokenizer, tmp_path: Path) -> None:
    tokenizer = small if kind == "sentencepiece" else Tokenizer.load(byte_level_file(tmp_path))
    stream = StreamDecoder(tokenizer)
    for text in AWKWARD:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        joined = "".join(map(stream.push, ids)) + stream.flush()
        assert joined == tokenizer.decode(ids)
        assert joined.replace(SPACE, " ") == text.replace(SPACE, " ")
    smile = tokenizer.encode("\U0001f600")
    assert [stream.push(id) for id in smile][-5:] == [""] * (len(smile) - 1) + ["\U0001f600"]
    assert stream.flush() == ""
    assert stream.push(smile[-4]) == ""
    assert stream.flush() == "\ufffd"


def test_random_ids_stream_as_they_decode(small: Tokenizer) -> None:
    draw = random.Random(1)
    for _ in range(200):
        ids = [draw.randrange(small.vocab_size) for _ in range(30)]
        stream = StreamDecoder(small)
        assert "".join(map(stream.push, ids)) + stream.flush() == small.decode(ids)


def test_unknown_decoder_still_streams_all_of_the_text(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "un": 2, "##believ": 3, "##able": 4, "story": 5}
    word_piece = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="<s>"))
    word_piece.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    word_piece.decoder = tokenizers.decoders.WordPiece()
    word_piece.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    stream = StreamDecoder(tokenizer)
    assert [stream.push(id) for id in (2, 3, 4, 5)] == ["un", "believ", "able", " story"]
    assert stream.flush() == ""
    assert tokenizer.decode([2, 3, 4, 5]) == "unbelievable story"


# Opening and saving


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_a_tokenizer_sent_to_a_worker_is_the_same(kind: str, small: Tokenizer, tmp_path: Path) -> None:
    tokenizer = small if kind == "sentencepiece" else Tokenizer.load(byte_level_file(tmp_path))
    again = pickle.loads(pickle.dumps(tokenizer))
    text = "a worker</s><|endoftext|> of 3\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.fingerprint == tokenizer.fingerprint


def test_special_tokens_in_text_are_plain_for_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_file(tmp_path))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.bos_id == tokenizer.eos_id == 0


def test_saved_folder_is_the_same_tokenizer(small: Tokenizer, model_file: Path, tmp_path: Path) -> None:
    small.save(tmp_path / "model")
    again = Tokenizer.load(tmp_path / "model")
    assert again.fingerprint == small.fingerprint == Tokenizer.load(model_file).fingerprint
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text("utf-8"))
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    # Other engines ask the library for special tokens: BOS before, nothing after, as LLaMA.
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert library.encode("one two").ids == [1, *small.encode("one two")]


def test_saved_tokenizer_json_keeps_its_special_tokens(tmp_path: Path) -> None:
    original = Tokenizer.load(byte_level_file(tmp_path))
    original.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.fingerprint, again.bos_id, again.eos_id) == (original.fingerprint, original.bos_id, original.eos_id)
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text("utf-8"))
    assert (config["bos_token"], config["add_bos_token"]) == ("<|endoftext|>", False)
    assert "unk_token" not in config


def test_config_beside_names_the_ends(tmp_path: Path) -> None:
    byte_level_file(tmp_path, bos=None)
    with pytest.raises(UserError, match=r"no BOS and EOS token.*<\|other\|>.*tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    config = {"bos_token": {"content": "<|other|>"}, "eos_token": "<|other|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_id == 0


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(UserError, match=r"holds tokenizer\.model or tokenizer\.json, this one holds readme\.txt"):
        Tokenizer.load(tmp_path)
    for content in ("hello", "", '{"a": 1}', "{"):
        (tmp_path / "readme.txt").write_text(content)
        with pytest.raises(UserError, match="not a tokenizer"):
            Tokenizer.load(tmp_path / "readme.txt")


def test_content_not_name_tells_the_kind(small: Tokenizer, model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_bytes(model_file.read_bytes())
    assert Tokenizer.load(tmp_path / "vocabulary.json").encode("one") == small.encode("one")


def test_model_without_eos_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=400, eos_id=-1, model_type="bpe", minloglevel=2
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"no EOS token.*there are: <s>"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {"model_type": "bpe", "user_defined_symbols": "<X>"}])
def test_model_without_exact_tokenizer_json_opens_but_is_not_saved(settings: dict[str, str], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=400, minloglevel=2, **settings
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(tmp_path / "a.model")
    assert tokenizer.encode("one")
    with pytest.raises(UserError, match="only BPE models of normal"):
        tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Training


def test_training_twice_gives_the_same_file_on_any_number_of_threads(model_file: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(corpus()), tmp_path / "again.model", 600, threads=1)
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.model"]


def test_trained_settings_are_llamas(model_file: Path, llama_file: Path) -> None:
    ours, llamas = model_file.read_bytes(), llama_file.read_bytes()
    assert read_settings(ours) == read_settings(llamas)
    assert read_pieces(ours)[:259] == read_pieces(llamas)[:259]


def test_digits_stand_alone_and_runs_of_spaces_together(small: Tokenizer) -> None:
    assert [small.piece(id) for id in small.encode("a 407")] == [f"{SPACE}a", SPACE, "4", "0", "7"]
    assert SPACE * 4 in [small.piece(id) for id in small.encode("\n        a")]


def test_long_line_without_newline_is_not_dropped(tmp_path: Path) -> None:
    line = " ".join(corpus()).replace("\n", " ")
    tokenizer = train_tokenizer([line], tmp_path / "a.model", 600)
    assert len(tokenizer.encode(line)) < 0.5 * len(line)


def test_sentence_with_the_trainers_own_marks_is_not_dropped(tmp_path: Path) -> None:
    texts = [text.replace("(", "\0").replace(")", "\u2585") for text in corpus()]
    tokenizer = train_tokenizer(texts, tmp_path / "a.model", 600)
    assert len(tokenizer.encode(texts[3])) < 0.7 * len(texts[3])


def test_training_says_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "a.model"
    with pytest.raises(UserError, match=r"vocabulary of 5000 pieces.*use vocab_size=(\d+) or less") as caught:
        train_tokenizer(["hello world"], file, 5000)
    largest = int(str(caught.value).split("vocab_size=")[1].split()[0])
    assert not file.exists()
    assert train_tokenizer(["hello world"], file, largest).vocab_size == largest
    with pytest.raises(UserError, match=r"vocabulary of 200 pieces.*or more"):
        train_tokenizer(["hello world"], file, 200)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "\n"], file, 300)


def test_training_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(corpus(), tmp_path / "a.model", 500)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# Conversations


def test_conversations_are_rendered_as_the_golden_ones(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "chat_template.json").read_text("utf-8"))["cases"]
    for case in cases:
        options = {"eos_token": case["eos_token"], "add_generation_prompt": case["add_generation_prompt"]}
        assert render_chat(case["messages"], **options) == case["rendered"]


@pytest.mark.parametrize("blocks", [True, False])
def test_template_renders_as_the_function(blocks: bool) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=blocks, lstrip_blocks=blocks).from_string(CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "\n two\nlines \n"},
        {"role": "assistant", "content": "{{ x }}"},
    ]
    for prompt in (True, False):
        ours = render_chat(messages, eos_token="<end>", add_generation_prompt=prompt)
        theirs = template.render(messages=messages, eos_token="<end>", add_generation_prompt=prompt)
        assert ours == theirs
    assert render_chat(messages[:2], add_generation_prompt=True) == (
        "<|system|>\n</s>\n<|user|>\n\n two\nlines \n</s>\n<|assistant|>\n"
    )


def test_unknown_role_is_refused() -> None:
    with pytest.raises(UserError, match=r"messages\[0\]\.role is 'robot'.*system, user, assistant"):
        render_chat([{"role": "robot", "content": "x"}])
