"""Model cards: what is carried over, what is said to be unknown, and what must not pile up."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from openelm import __version__, cli
from openelm.config import RunConfig
from openelm.data.tokenizer import Tokenizer
from openelm.interop.card import converted_card, milestone_card, parse, published_card, trained_card
from openelm.interop.source import Source
from openelm.model.folder import save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

APPLE = """---
license: apple-amlr
license_name: apple-ascl
license_link: LICENSE
datasets: [tiiuae/falcon-refinedweb]
extra_gated_prompt: not for a copy
---

# OpenELM

## Usage
Some words.

## Main Results
| task | score |
|---|---|
| PIQA | 69.75 |

## Bias, Risks, and Limitations
Without any safety guarantees.
"""


def source(card: str | None = None, origin: str = "apple/OpenELM-270M", notes: tuple[str, ...] = ()) -> Source:
    config = ModelConfig(model_dim=32, num_transformer_layers=1, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16)
    return Source(origin, config, torch.float32, lambda name: torch.zeros(1), card=card, notes=notes)


def converted(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], str]:
    return parse(converted_card(source(*args, **kwargs)))


def as_the_hub_reads_it(card: str) -> Any:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    return huggingface_hub.ModelCard(card).data


def test_licence_base_model_data_evaluation_and_risks_are_carried_over():
    metadata, body = converted(APPLE)
    assert metadata["license"] == "apple-amlr"
    assert metadata["license_link"] == "https://huggingface.co/apple/OpenELM-270M/blob/main/LICENSE"
    assert metadata["base_model"] == "apple/OpenELM-270M"
    assert metadata["datasets"] == ["tiiuae/falcon-refinedweb"]
    assert "extra_gated_prompt" not in metadata
    for words in ("# OpenELM\n", "| PIQA | 69.75 |", "## Bias, Risks, and Limitations\nWithout any safety"):
        assert words in body
    assert "[apple/OpenELM-270M](https://huggingface.co/apple/OpenELM-270M)" in body
    assert f"openelm-framework {__version__}" in body and "for research only" in body


def test_the_hub_reads_what_shows_a_snippet():
    data = as_the_hub_reads_it(converted_card(source(APPLE)))
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["openelm", "layer-wise-scaling"]
    assert as_the_hub_reads_it(converted_card(source(APPLE), library="mlx")).library_name == "mlx"


def test_apples_weights_keep_their_licence_where_no_card_came_along():
    metadata, body = converted(None)
    assert metadata["license"] == "apple-amlr"
    assert body.startswith("# OpenELM-270M\n") and "has no card" in body and "for research only" in body
    assert converted(None, "apple/OpenELM-3B-Instruct@main")[0]["license"] == "apple-amlr"


@pytest.mark.parametrize("card", [None, "", "# Only words\n", "---\ntags: [x]\n---\n# Words\n"])
@pytest.mark.parametrize("origin", ["some/model", "/home/alice/models/mine.pt", "apple/Other"])
def test_an_unknown_licence_is_said_to_be_unknown(card, origin):
    metadata, body = converted(card, origin)
    assert metadata["license"] == "unknown" and "licence is not known" in body
    assert "alice" not in body  # the name of the file is enough


def test_converting_again_piles_nothing_up_and_forgets_nothing():
    first = converted_card(source(APPLE, notes=("vocabulary 32128 -> 32000: rows were dropped",)))
    second = converted_card(source(first, "/models/hf", notes=("a second note",)))
    third = converted_card(source(second, "/models/hf", notes=("a second note",)))
    assert third == second
    metadata, body = parse(second)
    assert metadata["base_model"] == "apple/OpenELM-270M" and metadata["license"] == "apple-amlr"
    assert body.count("## Converted with OpenELM") == 1 and body.count("# OpenELM\n") == 1
    assert body.count("- vocabulary 32128 -> 32000: rows were dropped\n- a second note") == 1
    assert "weights are those of [apple/OpenELM-270M]" in body
    assert parse(first)[1].split("## Converted")[0] == body.split("## Converted")[0]


def test_the_section_is_renewed_where_it_stands_in_the_middle():
    card = converted_card(source(APPLE)) + "\n## Added by hand\nWords.\n"
    _, body = converted(card)
    assert body.count("## Converted with OpenELM") == 1 and "## Added by hand\nWords." in body


def test_a_local_folder_of_the_same_form_as_a_hub_id_is_no_base_model(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    metadata, body = converted("# Tiny\n", "models/tiny")
    assert "base_model" not in metadata and "those of `tiny`" in body


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [unclosed\n---\n# Words\n",
        "---\n- a list\n---\n# Words\n",
        "---\nlicense: mit\n# Words, and no end\n",
        "---\n" + "[" * 3000 + "\n---\n# Words\n",
        "---\n!!python/object/apply:os.system [touch pwned]\n---\n# Words\n",
        "---\na0: &a0 [x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
        + "tags: *a9\n---\n# Words\n",
        "---\nlicense: &mit mit\nbase: {<<: *mit}\n---\n# Words\n",
        f"---\nlicense: mit\ntags: [{'x, ' * 2**20}]\n---\n# Words\n",
        f"---\nlicense: mit\nmodel-index: 0x{'f' * 50_000}\n---\n# Words\n",
    ],
    ids=["open", "list", "endless", "deep", "python", "billion laughs", "one alias", "too long", "a number too long"],
)
def test_a_head_that_is_not_yaml_is_left_as_words_and_runs_nothing(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start_s = time.perf_counter()
    metadata, body = converted(card, "some/model")
    assert time.perf_counter() - start_s < 5  # it would be hours
    assert metadata["license"] == "unknown" and "# Words" in body
    assert not (tmp_path / "pwned").exists()


def test_odd_values_are_borne():
    card = "\ufeff---\r\nlicense: 7\r\nbase_model: [a/b, c/d]\r\ntags: one\r\nlicense_link: 3\r\n---\r\n# T\r\n"
    metadata, body = converted(card, "/x/y.pt")
    assert metadata["base_model"] == ["a/b", "c/d"] and "[a/b](https://huggingface.co/a/b)" in body
    assert metadata["tags"] == ["one", "openelm", "layer-wise-scaling"] and body.startswith("# T")


@pytest.fixture
def config(recipe) -> RunConfig:
    return RunConfig.model_validate(recipe)


def test_the_card_of_a_run_has_the_same_shape(config):
    card = trained_card(config, parameters=12345, steps=8, tokens=1024, bits_per_byte=2.34567)
    metadata, body = parse(card)
    assert "license" not in metadata and "base_model" not in metadata
    assert "12,345 parameters, trained for 8 steps on\n1,024 tokens" in body
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["# tiny", "## Licence", "## Data", "## Evaluation", "## Bias, risks and limitations"]
    assert "- words: `" in body and "2.346 bits per byte" in body
    (result,) = as_the_hub_reads_it(card).eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", 2.3457)


def test_a_run_without_held_out_text_claims_no_figure(config):
    metadata, body = parse(trained_card(config, parameters=1, steps=1, tokens=1))
    assert "model-index" not in metadata and "Not measured." in body


def test_datasets_of_the_hub_are_named(recipe):
    recipe["data"]["sources"] = [
        {"name": "a", "path": "hf://datasets/tiiuae/falcon-refinedweb/data/*.parquet"},
        {"name": "b", "path": "hf://datasets/tiiuae/falcon-refinedweb@main/other.parquet"},
        {"name": "c", "path": "/data/x"},
    ]
    metadata, _ = parse(trained_card(RunConfig.model_validate(recipe), parameters=1, steps=1, tokens=1))
    assert metadata["datasets"] == ["tiiuae/falcon-refinedweb"]


def trained_from(recipe: dict[str, Any], start: str, base_card: str | None) -> tuple[dict[str, Any], str]:
    recipe["train"]["init_from"] = start
    config = RunConfig.model_validate(recipe)
    return parse(trained_card(config, parameters=1, steps=1, tokens=1, base_card=base_card))


def test_a_run_that_began_from_apples_weights_stays_under_their_licence(recipe, tmp_path):
    metadata, body = trained_from(recipe, str(tmp_path / "start"), converted_card(source(APPLE)))
    assert (metadata["license"], metadata["base_model"]) == ("apple-amlr", "apple/OpenELM-270M")
    assert "began from apple/OpenELM-270M" in body and "for research only" in body and str(tmp_path) not in body


@pytest.mark.parametrize("card", [None, "# Words\n", "---\nlicense: unknown\n---\n# Words\n", APPLE])
def test_a_run_that_began_from_a_name_on_the_hub_names_it_and_apples_keep_their_licence(recipe, card):
    metadata, body = trained_from(recipe, "apple/OpenELM-270M@main", card)
    assert (metadata["license"], metadata["base_model"]) == ("apple-amlr", "apple/OpenELM-270M")
    if card == APPLE:
        assert metadata["license_link"] == "https://huggingface.co/apple/OpenELM-270M/blob/main/LICENSE"
    assert "began from apple/OpenELM-270M" in body and "for research only" in body
    assert "license" not in trained_from(recipe, "some/model", None if card == APPLE else card)[0]


@pytest.mark.parametrize("start", ["hub", "run", "gguf"])
def test_a_run_takes_the_licence_from_whatever_it_began_from(recipe, write_recipe, tmp_path, hub, start):
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer = Tokenizer.load(recipe["tokenizer"]["path"])
    model = OpenELM(ModelConfig(**recipe["model"], vocab_size=tokenizer.vocab_size))
    save_model(model, first / "model", tokenizer=tokenizer, card=APPLE)
    if start == "hub":
        files = {file.name: file.read_bytes() for file in (first / "model").iterdir()}
        hub.add("me/tiny", files)
    if start == "gguf":
        pytest.importorskip("gguf")
        assert cli.run(["convert", str(first), str(tmp_path / "it.gguf"), "--to", "gguf"]) == 0
    recipe["train"]["init_from"] = {"hub": "me/tiny", "run": str(first), "gguf": str(tmp_path / "it.gguf")}[start]
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(second)]) == 0
    metadata, body = parse(Path(second / "model" / "README.md").read_text(encoding="utf-8"))
    assert (metadata["license"], metadata["license_name"]) == ("apple-amlr", "apple-ascl")
    assert metadata.get("base_model") == ("me/tiny" if start == "hub" else None)
    assert "for research only" in body and str(tmp_path / "first") not in body


def test_a_run_that_began_from_a_model_without_a_card_does_not_know_its_licence(recipe, tmp_path):
    metadata, body = trained_from(recipe, str(tmp_path / "start"), None)
    assert "license" not in metadata and "base_model" not in metadata
    assert "began from `start`" in body and "not known" in body


def test_publishing_twice_gives_the_same_card(config):
    card = trained_card(config, parameters=1, steps=1, tokens=1)
    once = published_card(card, "tiny", "- `main`: the model.")
    assert published_card(once, "tiny", "- `main`: the model.") == once
    assert once.count("## In this repository") == 1
    bare = parse(published_card("", "tiny", "words"))
    assert bare[0]["library_name"] == "transformers" and bare[1].startswith("# tiny\n\n## In this repository")


def test_a_milestone_has_the_licence_and_none_of_the_figures(config):
    card = trained_card(config, parameters=1, steps=1, tokens=1, bits_per_byte=2.0)
    metadata, body = parse(milestone_card(card, "tiny", 5000, 10**9))
    assert "model-index" not in metadata and "bits per byte" not in body
    assert "# tiny after step 5,000" in body and "1,000,000,000 tokens" in body and "## Bias, risks" in body


def test_metadata_is_safe_yaml(config):
    card = trained_card(config, parameters=1, steps=1, tokens=1, bits_per_byte=1.0)
    assert "!!" not in card and yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
