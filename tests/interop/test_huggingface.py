"""One folder, the same numbers: in our engine, in transformers, and in transformers without our package."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import openelm.interop.huggingface  # noqa: F401 (makes the Auto classes know OpenELM)
import small_models
from openelm import cli
from openelm.data.chat import CHAT_TEMPLATE, render_chat
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.infer.engine import Engine
from openelm.interop import transformers_folder
from openelm.interop.convert import convert, open_source
from openelm.interop.source import open_folder
from openelm.interop.target import Format, MissingEngineError
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
# fp32 with sums in another order: logits of a few units differ in the fifth digit.
CLOSE = dict(rtol=0, atol=1e-4)
UNEVEN = {**small_models.UNEVEN, "vocab_size": 400}  # as many rows as the tokenizer has tokens
AWKWARD = [
    "def read(self, size=-1):\n\treturn None  # naïve — 100 %",
    "  two spaces before,  two within, one after ",
    "\n\n\r\n\x00tabs\t\tand\u00a0a hard space",
    "日本語のテキスト, emoji 👩‍👩‍👧‍👦 and \U0001f9ff, combining e\u0301, \ufb01 ligature",
    "<pad> <|user|> [INST] <0x0A> </S> are words here",
    "1234567890 3.14159 ½ ٣",
    "",
    " ",
    "a",
]
# What makes a process that has never heard of our package.
WITHOUT_US = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "openelm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import openelm
    raise SystemExit("the package is there")
except ModuleNotFoundError:
    pass
"""
STRANGER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
asked = json.load(open(sys.argv[1]))
answer = {}
for number, request in enumerate(asked):
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        answer[f"{number}.logits"] = model(torch.tensor(request["rows"])).logits
    if request.get("texts"):
        tokenizer = AutoTokenizer.from_pretrained(request["folder"])
        request["ids"] = [tokenizer(text, add_special_tokens=False).input_ids for text in request["texts"]]
        request["whole_ids"] = [tokenizer(text).input_ids for text in request["texts"]]
        request["special"] = tokenizer("a</s>", add_special_tokens=False).input_ids
        request["decoded"] = [tokenizer.decode(ids) for ids in request["ids"]]
        prompt = tokenizer("def read(", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=10, do_sample=False)
        request["greedy"] = ids[0, prompt.input_ids.shape[1]:].tolist()
save_file(answer, sys.argv[2])
json.dump(asked, open(sys.argv[1], "w"))
"""


def make(golden_weights, **changes: object) -> OpenELM:
    model = OpenELM(ModelConfig(**{**UNEVEN, **changes}))  # type: ignore[arg-type]
    # Doubled, because a text of one token over and over would hide a wrong position.
    model.load_state_dict({name: w * (1 + (w.dim() > 1)) for name, w in golden_weights(model, 5).items()})
    return model.eval()


def export(folder: Path, destination: Path, dtype: torch.dtype = torch.float32) -> Path:
    convert(open_folder(folder), "hf", destination, Format(dtype))
    return destination


def random_rows(vocab_size: int) -> list[list[int]]:
    return torch.randint(3, vocab_size, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()


def ask_a_stranger(folder: Path, requests: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a fresh process without our package answers: the requests with their answers, and logits by number."""
    asked, answer = folder / "asked.json", folder / "answer.safetensors"
    asked.write_text(json.dumps(requests))
    run_without_us(folder, STRANGER, str(asked), str(answer))
    return json.loads(asked.read_text()), load_file(answer)


def run_without_us(folder: Path, code: str, *words: str) -> str:
    """What a script prints in a fresh process without our package, without a network, and with nobody to ask."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US + code, *words],
        env={**kept, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ours(tmp_path_factory, golden_weights, tokenizer_file) -> Path:
    """A tiny model with uneven layers and a tokenizer of 400 pieces, written by us."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    return save_model(make(golden_weights), folder, tokenizer=Tokenizer.load(tokenizer_file))


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory) -> Path:
    return export(ours, tmp_path_factory.mktemp("exported") / "model-hf")


@pytest.fixture(scope="module")
def untied(tmp_path_factory, golden_weights) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    save_model(make(golden_weights, share_input_output_layers=False), folder / "model")
    return export(folder / "model", folder / "model-hf")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, exported, untied, ours, golden_weights, tokenizer_file):
    """Answers about the tied model, the untied one, the tied one in bf16, and a folder that was only completed."""
    folder = tmp_path_factory.mktemp("stranger")
    save_model(make(golden_weights), folder / "completed", dtype=torch.bfloat16)
    transformers_folder.complete(folder / "completed")
    rows = random_rows(400)
    half = export(ours, folder / "half", torch.bfloat16)
    requests = [{"folder": str(path), "rows": rows} for path in (exported, untied, half, folder / "completed")]
    requests[0]["texts"] = AWKWARD
    answers, logits = ask_a_stranger(folder, requests)
    return answers, logits


def load(folder: Path, **options: object):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


# The same numbers


@pytest.mark.parametrize("number", [0, 1], ids=["tied", "untied"])
def test_the_same_folder_gives_the_same_logits_everywhere(stranger, number):
    answers, logits = stranger
    folder, rows = Path(answers[number]["folder"]), answers[number]["rows"]
    with torch.no_grad():
        expected = load_model(folder)(torch.tensor(rows))
    assert expected.abs().max() > 2
    torch.testing.assert_close(transformers_folder.TARGET.logits(folder, rows), expected, **CLOSE)
    torch.testing.assert_close(logits[f"{number}.logits"], expected, **CLOSE)


@pytest.mark.parametrize("number", [2, 3], ids=["exported", "completed"])
def test_bf16_too(stranger, number):
    answers, logits = stranger
    folder, rows = Path(answers[number]["folder"]), answers[number]["rows"]
    with torch.no_grad():
        expected = load_model(folder)(torch.tensor(rows))
        exact = load_model(folder, dtype=torch.float32)(torch.tensor(rows))
    assert expected.dtype == logits[f"{number}.logits"].dtype == torch.bfloat16
    # The same operations in the same order: what differs is the last bit of a norm. The bound is a fifth of what bf16
    # itself costs against fp32, at its worst.
    bound = (expected.float() - exact).abs().max().item() / 5
    torch.testing.assert_close(transformers_folder.TARGET.logits(folder, rows), expected.float(), rtol=0, atol=bound)
    torch.testing.assert_close(logits[f"{number}.logits"], expected, rtol=0, atol=bound)


@pytest.fixture(scope="module")
def released(shared, tmp_path_factory, golden_weights):
    """The 270M with golden weights and LLaMA's tokenizer: what a stranger says, the figures, our logits."""
    folder = tmp_path_factory.mktemp("released")
    figures = json.loads((shared / "golden" / "openelm_270m.json").read_text())
    with torch.device("meta"):
        model = OpenELM(ModelConfig.from_name("270M", vocab_size=figures["vocab_size"]))
    model.load_state_dict(golden_weights(model, figures["seed"]), assign=True)
    tokenizer = Tokenizer.load(shared / "data" / "llama-tokenizer" / "tokenizer.model")
    transformers_folder.complete(save_model(model, folder / "model", tokenizer=tokenizer))
    rows = [figures["tokens"][:-1]]
    with torch.no_grad():
        expected = model(torch.tensor(rows))
    del model
    answers, logits = ask_a_stranger(folder, [{"folder": str(folder / "model"), "rows": rows, "texts": AWKWARD}])
    return answers[0], logits["0.logits"], figures, expected


def test_the_270m_everywhere(released):
    answer, theirs, figures, expected = released
    known = torch.tensor(figures["next_token_logprob"])
    for found in (transformers_folder.TARGET.logits(Path(answer["folder"]), answer["rows"]), theirs):
        torch.testing.assert_close(found, expected, **CLOSE)
        of_next = found[0].log_softmax(-1).gather(1, torch.tensor(figures["tokens"][1:])[:, None])[:, 0]
        torch.testing.assert_close(of_next, known, **CLOSE)
        assert found[0, -1].topk(20).indices.tolist() == figures["last_position_top20_ids"]


def test_both_write_the_same_greedy_text(exported, stranger):
    engine, model = Engine.load(exported, device="cpu"), load(exported)
    prompts = ["After another", "def read("]
    ids = [[1, *engine.tokenizer.encode(prompt)] for prompt in prompts]
    completions = engine.generate(ids, max_new_tokens=10)
    width = max(map(len, ids))
    batch = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids])
    written = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    for completion, row in zip(completions, written[:, width:].tolist(), strict=True):
        assert completion.ids == row[: len(completion.ids)]
        assert len(set(completion.ids)) > 4
    assert stranger[0][0]["greedy"] == completions[1].ids


# Tokenizers


def check_tokenizer(tokenizer: Tokenizer, answer: dict) -> None:
    ours = [tokenizer.encode(text) for text in AWKWARD]
    assert answer["ids"] == ours
    assert answer["whole_ids"] == [[tokenizer.bos_id, *ids] for ids in ours]
    assert answer["decoded"] == [tokenizer.decode(ids) for ids in ours]
    # The one difference, which chat templates need: "</s>" in a text is the end of text to transformers, and not to us.
    assert answer["special"] == [*tokenizer.encode("a"), tokenizer.eos_id]


def test_the_tokenizer_gives_our_ids_on_awkward_text(exported, stranger):
    check_tokenizer(Tokenizer.load(exported), stranger[0][0])


def test_llamas_tokenizer_gives_our_ids_on_awkward_text(released):
    check_tokenizer(Tokenizer.load(Path(released[0]["folder"])), released[0])


def test_conversations_are_rendered_as_ours(ours, tmp_path):
    turns = [{"role": "user", "content": "Who?\n"}, {"role": "assistant", "content": " Me."}]
    convert(replace(open_folder(ours), chat_template=CHAT_TEMPLATE), "hf", tmp_path / "model", Format(torch.float32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for prompt in (True, False):
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        assert rendered == render_chat(turns, add_generation_prompt=prompt)


# What is written


def test_the_auto_classes_know_openelm(exported):
    from transformers import AutoConfig, AutoModel

    from openelm.interop.modeling_openelm import OpenELMConfig, OpenELMForCausalLM

    assert type(AutoConfig.from_pretrained(exported)) is OpenELMConfig
    whole, rows = load(exported), torch.tensor(random_rows(400))
    assert type(whole) is OpenELMForCausalLM
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(exported).eval()(rows).last_hidden_state
        torch.testing.assert_close(whole.lm_head(hidden), whole(rows).logits, **CLOSE)


def test_round_trips_are_the_same_bits(exported, untied, ours, tmp_path):
    for first in (exported, untied):
        load(first).save_pretrained(tmp_path / first.parent.name)
        back = export(tmp_path / first.parent.name, tmp_path / f"{first.parent.name}-back")
        stored, again = load_file(first / "model.safetensors"), load_file(back / "model.safetensors")
        assert stored.keys() == again.keys()
        assert ("lm_head.weight" in stored) == (first == untied)
        assert all(torch.equal(stored[name], again[name]) for name in stored)
        assert load_model(back).config == load_model(first).config
    weights, first = load_model(exported).state_dict(), load_model(ours).state_dict()
    assert all(torch.equal(weights[name], first[name]) for name in first)


def test_the_folder_says_what_it_is(ours, exported, tmp_path, golden_weights, tokenizer_file):
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"] == transformers_folder.AUTO_MAP
    assert {k: v for k, v in config.items() if k != "auto_map"} == json.loads((ours / "config.json").read_text())
    assert (exported / "modeling_openelm.py").read_bytes() == transformers_folder.MODELING_FILE.read_bytes()
    assert json.loads((exported / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert {file.name for file in exported.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_openelm.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_a_tokenizers_pad_and_a_chat_template_come_along(ours, tmp_path):
    class Padded:
        pad_id = 7

        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    source = replace(open_folder(ours), tokenizer=Padded(), chat_template="{{ messages }}")  # type: ignore[arg-type]
    convert(source, "hf", tmp_path / "model", Format(torch.float32))
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["pad_token_id"] == 7
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_quantised_weights_are_refused_with_the_remedy(ours, tmp_path):
    with pytest.raises(UserError, match=r"--quantize q4 is not written for transformers: use --to mlx or --to gguf"):
        convert(open_folder(ours), "hf", tmp_path / "model", Format(torch.float32, quantize="q4"))
    assert not (tmp_path / "model").exists()


def test_folders_are_written_where_transformers_is_missing(ours, tmp_path):
    code = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from openelm.interop.convert import convert
from openelm.interop.transformers_folder import TARGET
from openelm.interop.source import open_folder
from openelm.interop.target import Format, MissingEngineError

convert(open_folder(Path(sys.argv[1])), "hf", Path(sys.argv[2]), Format(torch.float32))
try:
    TARGET.logits(Path(sys.argv[2]), [[1, 2]])
except MissingEngineError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ours), str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'openelm-framework[hf]'" in done.stdout
    assert (tmp_path / "model" / "modeling_openelm.py").is_file()
    assert issubclass(MissingEngineError, UserError)


# What stands on transformers


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Nothing is asked of the Hub; what is written, caches too, goes under tmp_path."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_peft_adapter_is_saved_loaded_and_merged(exported, tmp_path, dora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    rows = torch.tensor(random_rows(400))
    model = peft.get_peft_model(load(exported), peft.LoraConfig(r=4, target_modules=["qkv_proj"], use_dora=dora))
    # One A and one B in each of the three layers, as wide as each layer is.
    widths = [p.shape[0] for name, p in model.named_parameters() if "lora_B" in name]
    assert widths == [(q + 2 * kv) * 16 for q, kv in zip((2, 4, 6), (1, 2, 3), strict=True)]
    before = model(rows).logits.detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(rows).logits
        assert (tuned - before).abs().max() > 0.05
        again = peft.PeftModel.from_pretrained(load(exported), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(rows).logits, tuned, **CLOSE)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load_model(tmp_path / "merged")(rows), tuned, **CLOSE)


def test_trl_trains_on_preferences(exported, quiet, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [{"prompt": "After", "chosen": " another letter", "rejected": " night"}] * 4
    arguments = trl.DPOConfig(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        lr_scheduler_type="constant", use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        load(exported), args=arguments, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # At first the model is its own reference: whatever the weights, the loss is ln 2.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[1] < losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    assert load_model(tmp_path / "tuned").config == load_model(exported).config


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_scores_as_our_engine_does(exported, quiet, batch_size):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [("After all", " another letter"), ("The", " night"), ("", "mountain"), ("a b c d e f g h", " i")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
    harness = HFLM(str(exported), device="cpu", dtype="float32", batch_size=batch_size, add_bos_token=True)
    found = harness.loglikelihood(requests)
    engine = Engine.load(exported, device="cpu")
    for (context, continuation), (score, greedy) in zip(texts, found, strict=True):
        whole = [1, *engine.tokenizer.encode(context + continuation)]
        start = len([1, *engine.tokenizer.encode(context)])
        with torch.no_grad():
            log_probabilities = engine.model(torch.tensor([whole]))[0].log_softmax(-1)
        targets = torch.tensor(whole[start:])
        expected = log_probabilities[start - 1 : -1].gather(1, targets[:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == (log_probabilities[start - 1 : -1].argmax(-1) == targets).all().item()


def test_the_guide_runs_as_one_script_of_a_stranger(ours, tmp_path, monkeypatch, capsys):
    for package in ("peft", "trl", "lm_eval", "datasets", "gguf"):
        pytest.importorskip(package)
    guide = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|)\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["", *["python"] * 6, ""]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model").symlink_to(ours)
    (before, *script, after) = (text for _, text in blocks)
    run_commands(before)
    capsys.readouterr()
    printed = run_without_us(tmp_path, "".join(script))
    tokenizer, model = transformers.AutoTokenizer.from_pretrained("demo-hf"), load(tmp_path / "demo-hf")
    expected = ""
    for prompt in ("def read(self", "def read(self", "class Reader(io.Base):\n"):
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40)
        expected += tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    assert printed.startswith(expected)
    assert printed.rstrip().endswith(("0.0", "1.0"))
    run_commands(after)
    assert capsys.readouterr().out.startswith("def ")
    config = load_model(ours).config
    assert load_model("my-model").config == load_model("my-dpo-model").config == config
    merged, written = open_folder(Path("my-model")), open_source("my.gguf")
    assert all(torch.equal(merged.weight(name), written.weight(name)) for name in merged.shapes)


def run_commands(block: str) -> None:
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert (program, cli.run(words)) == ("openelm", 0)


def test_a_batch_of_prompts_is_padded_on_the_left(exported, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["After another", "The"], padding=True, return_tensors="pt")
    long, short = (tokenizer(text).input_ids for text in ("After another", "The"))
    gap = len(long) - len(short)
    assert gap > 0
    assert batch.input_ids.tolist() == [long, [tokenizer.eos_token_id] * gap + short]
    assert batch.attention_mask.tolist() == [[1] * len(long), [0] * gap + [1] * len(short)]
    tokenizer.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
