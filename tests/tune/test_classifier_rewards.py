"""Rewards that are classifiers of transformers: computed in batches, which change nothing."""

import math
from pathlib import Path

import pytest
import torch

from openelm.errors import UserError
from openelm.tune.rejection import Prompt
from openelm.tune.rewards import open_reward

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TEXT = Prompt("how long is it", [1], {"answer": "long"})
CHAT = Prompt([{"role": "user", "content": "how long is it"}], [1], {})
WORDS = "[PAD] [UNK] [CLS] [SEP] how long is it very short indeed not at all user assistant"
ANSWERS = ("very long", "short", "it is not at all very very long indeed", "not", "very short")


def ask(
    folder: Path, prompt: Prompt = TEXT, answers: tuple[str, ...] = ANSWERS, label: str | None = None
) -> list[float]:
    reward, _ = open_reward(str(folder), label, CPU)
    return reward([(prompt, answer) for answer in answers])


def save_tokenizer(folder: Path, template: str | None = None, *, types: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_bert(folder: Path, template: str | None = None, **options: object) -> Path:
    """Random weights, large enough for rewards to differ."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.5,
        **{"num_labels": 1, **options},
    )
    torch.manual_seed(1)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def logits(folder: Path, *texts: str, **options: object) -> torch.Tensor:
    """Of one text or pair by itself, as transformers' own documentation does it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt", **options)
    with torch.no_grad():
        return model(**inputs).logits[0].double()


def test_a_classifier_judges_pairs_of_texts_in_batches_as_one_by_one(tmp_path):
    folder = save_bert(tmp_path)
    expected = [logits(folder, TEXT.content, answer).item() for answer in ANSWERS]
    assert max(expected) - min(expected) > 0.1
    assert ask(folder) == pytest.approx(expected, abs=1e-5)
    assert ask(folder, CHAT) == pytest.approx(expected, abs=1e-5)  # no template: the user's turn is the text


def test_a_classifiers_own_template_lays_out_a_conversation(tmp_path):
    template = "[CLS] {% for m in messages %}{{ m['role'] }} {{ m['content'] }} [SEP] {% endfor %}"
    folder = save_bert(tmp_path, template)
    texts = [f"[CLS] user how long is it [SEP] assistant {answer} [SEP] " for answer in ANSWERS]
    expected = [logits(folder, text, add_special_tokens=False).item() for text in texts]
    assert ask(folder, CHAT) == pytest.approx(expected, abs=1e-5)
    pair = [logits(folder, TEXT.content, answer).item() for answer in ANSWERS]
    assert ask(folder, TEXT) == pytest.approx(pair, abs=1e-5)  # a text is no conversation


def test_the_log_odds_of_one_class_of_several(tmp_path):
    folder = save_bert(tmp_path, id2label={0: "bad", 1: "fair", 2: "good"}, num_labels=3)
    found = [logits(folder, TEXT.content, answer) for answer in ANSWERS]
    probabilities = [one.softmax(0)[2].item() for one in found]
    assert ask(folder, label="good") == pytest.approx([math.log(p / (1 - p)) for p in probabilities], abs=1e-5)


def test_one_of_several_outputs_that_are_no_classes(tmp_path):
    folder = save_bert(tmp_path, id2label={0: "clear", 1: "kind"}, num_labels=2, problem_type="regression")
    expected = [logits(folder, TEXT.content, answer)[1].item() for answer in ANSWERS]
    assert ask(folder, label="kind") == pytest.approx(expected, abs=1e-5)


def test_which_output_is_to_be_said(tmp_path):
    folder = save_bert(tmp_path, id2label={0: "bad", 1: "good"}, num_labels=2)
    with pytest.raises(UserError, match=r"has 2 outputs: name the one .* with --reward-label: bad, good"):
        open_reward(str(folder), None, CPU)
    with pytest.raises(UserError, match=r"--reward-label best: .* has bad, good"):
        open_reward(str(folder), "best", CPU)


def test_what_is_too_long_for_the_classifier_loses_its_beginning(tmp_path, capsys):
    folder = save_bert(tmp_path)
    long = Prompt("it is " * 20 + "how long", [1], {})
    (found,) = ask(folder, long, ("very short",))
    # 24 positions: [CLS], two [SEP], two of the answer, and the last nineteen of the prompt.
    kept = " ".join(long.content.split()[-19:])
    assert found == pytest.approx(logits(folder, kept, "very short").item(), abs=1e-5)
    assert capsys.readouterr().err.count("reads 24 tokens at most") == 1


@pytest.mark.parametrize("pad", [0, None])
def test_a_decoder_is_read_at_its_last_token_with_and_without_padding(tmp_path, pad):
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=pad,
    )
    torch.manual_seed(1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, types=False)
    expected = [logits(tmp_path, TEXT.content, answer).item() for answer in ANSWERS]
    assert ask(tmp_path) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_head_is_refused(tmp_path):
    save_bert(tmp_path)
    config = transformers.BertConfig.from_pretrained(tmp_path)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no classifier\.bias, so its rewards would be random"):
        open_reward(str(tmp_path), None, CPU)


def test_code_of_a_model_is_not_executed(tmp_path):
    save_bert(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match="code that comes with a model is not executed"):
        open_reward(str(tmp_path), None, CPU)


def test_other_weights_have_another_digest(tmp_path):
    first = open_reward(str(save_bert(tmp_path / "a")), None, CPU)[1]
    assert first == open_reward(str(save_bert(tmp_path / "b")), None, CPU)[1]
    assert first != open_reward(str(save_bert(tmp_path / "c", hidden_act="relu")), None, CPU)[1]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_has_another_digest(tmp_path, file):
    folder = save_bert(tmp_path, "{{ messages }}")
    first = open_reward(str(folder), None, CPU)[1]
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert first != open_reward(str(folder), None, CPU)[1]


def test_what_is_too_long_for_a_classifier_that_counts_from_behind_its_padding(tmp_path, capsys):
    """RoBERTa's 24 positions are 23 tokens where padding is 0; its tokenizer need not say so."""
    config = transformers.RobertaConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        type_vocab_size=1,
        pad_token_id=0,
        initializer_range=0.5,
        num_labels=1,
    )
    torch.manual_seed(1)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, types=False)
    for prompt in (
        "it is " * 9 + "how",
        "it is " * 20 + "how long",
    ):  # 24 tokens with the answer and the layout, and 47
        (found,) = ask(tmp_path, Prompt(prompt, [1], {}), ("very short",))
        kept = " ".join(prompt.split()[-18:])
        assert found == pytest.approx(logits(tmp_path, kept, "very short").item(), abs=1e-5)
    assert "reads 23 tokens at most" in capsys.readouterr().err


def test_a_reward_that_is_not_finite_is_refused(tmp_path):
    folder = save_bert(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="gave nan for the answer"):
        ask(folder)
