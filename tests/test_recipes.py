"""The packaged recipes hold the paper's values; recipes build on each other and have rows by size."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.config import RunConfig, load_recipe, recipe_names
from openelm.errors import UserError
from openelm.study.ablation import load_ablation
from openelm.train.schedule import Schedule
from openelm.tuning_config import TuneConfig, load_tuning

PAPER = ("270M", "450M", "1.1B", "3B")
PRETRAIN = ("pretrain", "pretrain-open", "pretrain-one-gpu")
TUNING = ("peft", "instruct")
# Table 2, in billions of tokens.
TABLE_2 = {
    "refinedweb": 665,
    "redpajama-github": 59,
    "redpajama-books": 26,
    "redpajama-arxiv": 28,
    "redpajama-wikipedia": 24,
    "redpajama-stackexchange": 20,
    "redpajama-c4": 175,
    "pile": 207,
    "dolma-stack": 411,
    "dolma-reddit": 89,
    "dolma-pes2o": 70,
    "dolma-gutenberg": 6,
    "dolma-wiki": 4.3,
}
# Small enough for a second on a CPU; a size stays named, so that its row is still what the run takes.
SHORT = [
    "model.model_dim=32", "model.num_transformer_layers=2", "model.head_dim=16", "model.num_gqa_groups=1",
    "model.ffn_dim_divisor=16", "model.vocab_size=400", "data.row_length=32", "data.min_tokens=16", "data.shards=4",
    "data.workers=0", "data.held_out=0.1", "data.validation_tokens=300", "train.steps=2", "train.warmup_steps=1",
    "train.global_batch=4", "train.micro_batch=2", "train.dtype=float32", "train.compile=false",
    "train.checkpoint_every=1", "train.milestone_every=0", "train.average_last=2", "train.validate_every=2",
    "train.sample_every=2", "train.sample_prompts=[After]", "train.sample_tokens=4", "train.log_every=1",
]  # fmt: skip


def plain(config: RunConfig) -> dict[str, Any]:
    """What a run writes as its config.yaml."""
    return yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))


def write(folder: Path, name: str, data: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


def refused(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is packaged


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("name", PRETRAIN)
def test_a_recipe_reads_again_from_what_it_resolves_to(name, size, tmp_path):
    config = load_recipe(name, [f"model.size={size}"])
    resolved = plain(config)
    assert config.model.size == size
    assert not resolved.keys() & {"by_size", "base"}
    assert load_recipe(write(tmp_path, "config", resolved), []) == config


def test_every_packaged_recipe_loads_as_it_is():
    loaders = {**dict.fromkeys([*PRETRAIN, "demo"], load_recipe), **dict.fromkeys(TUNING, load_tuning)}
    loaders |= dict.fromkeys(("ablation", "ablation-cluster"), load_ablation)
    assert loaders.keys() == set(recipe_names())
    loaded = {name: load(name, []) for name, load in loaders.items()}
    assert {name: config.name for name, config in loaded.items()} == {name: name for name in recipe_names()}


def tuning(name: str, size: str) -> TuneConfig:
    return load_tuning(name, [f"model.size={size}"])


def test_a_recipe_is_run_by_the_command_that_it_is_for():
    assert "run `openelm finetune peft`" in refused("peft")
    assert "or `openelm dpo`" in refused("instruct", "model.size=3B")
    with pytest.raises(UserError, match="names no model to tune"):
        load_tuning("demo", [])


def test_instruct_is_table_10():
    found = {
        size: (config.train.epochs, config.train.lr, config.preference.loss, config.train.sharding)
        for size in PAPER
        if (config := tuning("instruct", size)).preference
    }
    assert found == {
        "270M": (5, 2e-5, "hinge", "none"),
        "450M": (8, 3e-5, "hinge", "none"),
        "1.1B": (5, 5e-5, "sigmoid", "none"),
        "3B": (10, 1e-4, "hinge", "full"),
    }
    for config in (tuning("instruct", size) for size in PAPER):
        train, data, preference = config.train, config.data, config.preference
        assert (data.row_length, data.prompt_length, data.empty_system_turn) == (1024, 512, True)
        assert preference is not None and (preference.beta, preference.label_smoothing) == (0.01, 0)
        assert (train.warmup_ratio, train.weight_decay, train.schedule, train.min_lr) == (0.1, 0, "cosine", 0)
        assert (train.betas, train.eps, train.dtype) == ((0.9, 0.999), 1e-8, "bfloat16")
        assert (train.activation_checkpointing, train.global_batch, train.micro_batch) == ("full", 128, 8)


def test_peft_is_the_papers_recipe():
    for size, path in zip(PAPER, ("270M", "450M", "1_1B", "3B"), strict=True):
        config = tuning("peft", size)
        adapter, train, data = config.adapter, config.train, config.data
        assert config.model.path == f"apple/OpenELM-{path}"
        assert adapter is not None and (adapter.r, adapter.alpha, adapter.dropout) == (32, 32, 0.1)
        assert set(adapter.targets) == {"token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2"}
        assert (train.global_batch, train.steps, train.warmup_steps, train.warmup_init_lr) == (128, 4375, 1000, 1e-6)
        assert (train.lr, train.min_lr, train.betas, train.eps) == (3e-4, 3e-5, (0.9, 0.95), 1e-8)
        assert (train.weight_decay, train.clip_norm, train.z_loss, train.dtype) == (0, 1, 1e-4, "bfloat16")
        assert (data.row_length, data.packing, data.loss_on) == (2048, "pad", "all")


def test_the_paper_is_trained_on_the_thirteen_sources_of_table_2():
    shares = {source.name: source.share for source in load_recipe("pretrain", []).data.sources}
    assert shares == TABLE_2
    assert sum(shares.values()) == pytest.approx(1784.3), "approximately 1.8 trillion tokens"


def test_the_open_sources_keep_the_shares_of_what_they_stand_for():
    shares = {source.name: source.share for source in load_recipe("pretrain-open", []).data.sources}
    same = {"refinedweb": "refinedweb", "c4": "redpajama-c4", "fineweb-edu": "dolma-reddit", "pile": "pile"}
    same |= {"pes2o": "dolma-pes2o", "arxiv": "redpajama-arxiv", "stackexchange": "redpajama-stackexchange"}
    same |= {"old-books": "redpajama-books", "gutenberg": "dolma-gutenberg"}
    assert {name: shares[name] for name in same} == {name: TABLE_2[other] for name, other in same.items()}
    assert shares["stack-edu"] + shares["github"] == TABLE_2["redpajama-github"] + TABLE_2["dolma-stack"]
    wikipedia = sum(share for name, share in shares.items() if name.startswith("wikipedia-"))
    assert wikipedia == pytest.approx(TABLE_2["redpajama-wikipedia"] + TABLE_2["dolma-wiki"])
    assert sum(shares.values()) == pytest.approx(1784.3)


@pytest.mark.parametrize("name", ["pretrain-open", "pretrain-one-gpu"])
def test_the_open_sources_are_read_where_they_are(name):
    for source in load_recipe(name, []).data.sources:
        assert source.path.startswith("hf://datasets/"), source
        # A folder would be read with its README.md.
        assert source.path.endswith((".parquet", ".json.gz", ".jsonl.zst")), source


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("name", ["pretrain", "pretrain-open"])
def test_the_learning_rates_are_those_of_the_released_runs(golden, name, size):
    train = load_recipe(name, [f"model.size={size}"]).train
    schedule = Schedule(
        train.schedule,
        train.steps,
        train.lr,
        train.min_lr,
        train.warmup_steps,
        train.warmup_init_lr,
        train.decay_steps,
    )
    rates = golden("lr_schedule")["lr"][size]
    assert len(rates) == 13
    for step, rate in rates.items():
        assert schedule.at(int(step)) == pytest.approx(rate, rel=0, abs=1e-9), step


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("name", ["pretrain", "pretrain-open"])
def test_the_settings_are_those_of_table_9(golden, name, size):
    config = load_recipe(name, [f"model.size={size}"])
    train, data = config.train, config.data
    assert train.global_batch * data.row_length == 4_194_304
    assert (train.steps, train.warmup_steps, train.warmup_init_lr) == (350_000, 5000, 1e-6)
    assert (train.betas, train.eps, train.weight_decay, train.clip_norm, train.z_loss) == (
        (0.9, 0.95),
        1e-8,
        0.1,
        1,
        1e-4,
    )
    assert (data.min_characters, data.min_tokens, data.split_words) == (200, 256, 2048)
    assert data.packing == ("pad" if name == "pretrain" else "pack")
    assert train.activation_checkpointing == ("none" if size == "270M" else "full")
    assert train.sharding == ("full" if size == "3B" else "none")
    assert train.dtype == "bfloat16"
    assert (train.checkpoint_every, train.milestone_every, train.average_last) == (5000, 5000, 5)
    assert train.keep_last >= train.average_last
    geometry = config.model.build(vocab_size=32000, bos_id=1, eos_id=2)
    assert (
        geometry.num_parameters() == golden("geometry")[f"OpenELM-{size.replace('.', '_')}"]["parameters_vocab_32000"]
    )
    assert 128 * train.micro_batch == train.global_batch


def test_one_gpu_sees_twenty_tokens_for_each_parameter():
    config = load_recipe("pretrain-one-gpu", [])
    train, data = config.train, config.data
    parameters = config.model.build(vocab_size=32000, bos_id=1, eos_id=2).num_parameters()
    assert train.steps * train.global_batch * data.row_length / parameters == pytest.approx(20, rel=0.05)
    assert train.lr == pytest.approx(0.0053 / 8**0.5, rel=0.02)
    assert train.min_lr == pytest.approx(train.lr / 10)
    assert (data.packing, train.compile, train.activation_checkpointing, train.sharding) == (
        "pack",
        True,
        "none",
        "none",
    )
    assert data.shards / data.workers <= 64, "what a process keeps open of one source"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16, 32, 64, 96, 128])
def test_shards_of_the_large_recipes_divide_among_ranks(ranks):
    assert load_recipe("pretrain", []).data.shards % ranks == 0


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_packaged_recipe_runs_shortened_on_local_text(
    name, text_folder, tokenizer_file, recipe, tmp_path, monkeypatch, capsys
):
    # `recipe` is asked for the measurements that it leaves out of such short runs.
    count = len(load_recipe(name, []).data.sources)
    paths = [f"data.sources.{number}.path={text_folder}" for number in range(count)]
    short = [*SHORT, *paths, f"tokenizer.path={tokenizer_file}"]
    run = tmp_path / "run"
    assert cli.run(["pretrain", name, "--run", str(run), *short]) == 0, capsys.readouterr().err
    written = load_recipe(str(run / "config.yaml"), [])
    assert written == load_recipe(name, short)
    assert written.train.lr == load_recipe(name, []).train.lr
    assert (run / "model" / "model.safetensors").is_file()


def test_the_tokenizer_that_must_be_fetched_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["pretrain", "pretrain-one-gpu", "--run", str(tmp_path / "run")]) == 2
    assert "llama/tokenizer.model: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_recipes_in_the_documentation_are_read(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    sources, based = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    assert [s.share for s in load_recipe(write(tmp_path, "a", {"base": "demo", **sources}), []).data.sources] == [
        1,
        9,
        3,
    ]
    mine = load_recipe(write(tmp_path, "b", based), [])
    assert (mine.train.micro_batch, mine.train.lr, mine.data.packing) == (8, 5.3e-3, "pack")


# Rows by size


@pytest.fixture
def sized(recipe: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """Write the tiny recipe, of a named size and without learning rates, with these rows."""

    def write_sized(rows: Any, name: str = "sized", **sections: Any) -> str:
        recipe["train"].pop("lr", None)
        recipe["train"].pop("min_lr", None)
        model = {"size": "270M", "max_context_length": 64}
        return write(tmp_path, name, {**recipe, "model": model, "by_size": rows, **sections})

    return write_sized


ROWS = {
    "270M": {"train": {"lr": 0.02, "min_lr": 0.002}},
    "450M": {"train": {"lr": 0.01, "min_lr": 0.001, "steps": 50}, "model": {"ffn_multipliers": [1, 2]}},
}


def test_the_row_of_the_size_stands_over_the_recipe_and_overrides_over_both(sized):
    file = sized(ROWS)
    assert (load_recipe(file, []).train.lr, load_recipe(file, []).train.steps) == (0.02, 8)
    other = load_recipe(file, ["train.lr=0.5", "model.size=450M"])
    assert (other.train.lr, other.train.min_lr, other.train.steps) == (0.5, 0.001, 50)
    assert other.train.clip_norm == load_recipe(file, []).train.clip_norm
    assert other.model.ffn_multipliers == (1, 2), "a row's own geometry is kept"
    assert load_recipe(file, ["model={size: 450M, max_context_length: 64}"]).train.lr == 0.01
    assert load_recipe(file, ["model.size=OpenELM-450M"]).train.lr == 0.01


def test_a_size_without_a_row_is_refused_where_something_is_missing_then(sized):
    file = sized(ROWS)
    error = refused(file, "model.size=3B")
    assert "train.lr is missing" in error
    assert "by_size has rows for 270M, 450M, none for model.size=3B: choose one of these sizes" in error
    assert load_recipe(file, ["model.size=3B", "train.lr=0.1", "train.min_lr=0.01"]).train.lr == 0.1
    error = refused(file, "model.size=null", "model.model_dim=32", "model.num_transformer_layers=2")
    assert "none for a model without model.size" in error
    assert "by_size" not in refused(file, "train.steps=0"), "the row is there: it is not what is wrong"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"450M": {"train": {"lrr": 1}}}, "by_size.450M.train.lrr is not a key: did you mean train.lr?"),
        ({"450M": {"trian": {"lr": 1}}}, "by_size.450M.trian is not a key: did you mean train?"),
        ({"3B": {"train": {"lr": "fast"}}}, "by_size.3B.train.lr='fast'"),
        ({"3B": {"train": {"micro_batch": 2.5}}}, "by_size.3B.train.micro_batch=2.5"),
        (
            {"280M": {"train": {"lr": 1}}},
            "by_size.280M is no size (30M, 100M, 270M, 450M, 1.1B, 3B): did you mean 270M?",
        ),
        ({3: {"train": {"lr": 1}}}, "by_size.3 is no size"),
        ({"3B": {"model": {"size": "270M"}}}, "by_size.3B.model.size"),
        ({"3B": None}, "by_size.3B=None must hold sections"),
        ({"3B": {"train": 5}}, "by_size.3B.train=5"),
        (["3B"], "by_size=['3B'] must map sizes to sections"),
        (None, "by_size=None must map sizes to sections"),
    ],
)
def test_a_row_that_cannot_be_is_named_whichever_size_is_chosen(sized, rows, said):
    error = refused(sized(rows))
    assert "sized.yaml: " in error
    assert said in error


def test_problems_of_several_rows_are_reported_together(sized):
    error = refused(sized({"270M": {"train": {"lrr": 1}}, "3C": {"data": {"shard": 1}}}))
    for part in ("by_size.270M.train.lrr", "by_size.3C is no size", "by_size.3C.data.shard is not a key"):
        assert part in error


# Recipes on recipes


def test_a_recipe_stands_over_its_base_and_lists_are_replaced_whole(sized, tmp_path):
    sized(ROWS, name="below")
    sources = [{"name": "other", "path": "elsewhere", "share": 3}]
    file = write(tmp_path, "above", {"base": "below.yaml", "name": "above", "data": {"sources": sources, "shards": 9}})
    below, above = load_recipe(str(tmp_path / "below.yaml"), []), load_recipe(file, ["model.size=450M"])
    assert (above.name, above.data.shards, above.data.row_length) == ("above", 9, below.data.row_length)
    assert [source.name for source in above.data.sources] == ["other"]
    assert above.train.lr == 0.01, "the rows of the base are still there"


def test_a_recipe_stands_over_the_rows_of_its_base_and_its_own_rows_over_it(sized, tmp_path):
    sized(ROWS, name="below")
    rows = {"450M": {"train": {"min_lr": 0.0005}}}
    file = write(tmp_path, "above", {"base": "below.yaml", "train": {"lr": 0.3}, "by_size": rows})
    assert (load_recipe(file, []).train.lr, load_recipe(file, []).train.min_lr) == (0.3, 0.002)
    other = load_recipe(file, ["model.size=450M"]).train
    assert (other.lr, other.min_lr, other.steps) == (0.3, 0.0005, 50)


def test_a_size_that_is_named_above_replaces_the_geometry_below(recipe, tmp_path):
    write(tmp_path, "below", recipe)  # 32 wide, two layers
    file = write(tmp_path, "above", {"base": "below.yaml", "model": {"size": "450M", "ffn_dim_divisor": 128}})
    model = load_recipe(file, []).model
    assert (model.size, model.model_dim, model.num_transformer_layers) == ("450M", None, None)
    assert model.ffn_dim_divisor == 128, "what stands beside the name changes it"
    assert model.max_context_length == 64, "no size decides this"


def test_a_base_is_a_packaged_name_or_a_path_beside_the_recipe(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    (folder / "more").mkdir(parents=True)
    write(folder, "first", recipe)
    write(folder / "more", "second", {"base": "../first.yaml", "seed": 7})
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/more/second.yaml", []).seed == 7
    third = write(tmp_path, "third", {"base": "demo", "train": {"steps": 60}})
    assert load_recipe(third, []).train.steps == 60
    assert load_recipe(third, []).model == load_recipe("demo", []).model


def test_a_run_can_be_the_base_of_a_recipe(tmp_path):
    config = load_recipe("pretrain", [])
    write(tmp_path, "config", {**plain(config), "geometry": {"model_dim": 1280}})
    assert load_recipe(write(tmp_path, "again", {"base": "config.yaml"}), []) == config


def test_bases_that_lead_back_are_refused_with_their_way(tmp_path):
    first = write(tmp_path, "first", {"base": "second.yaml"})
    write(tmp_path, "second", {"base": "./first.yaml"})
    error = refused(first)
    assert "lead back" in error
    assert error.index("first.yaml -> ") < error.index("second.yaml -> ")
    assert "lead back" in refused(write(tmp_path, "own", {"base": "own.yaml"}))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("pretrian", "base 'pretrian' is no file and no packaged recipe: did you mean pretrain?"),
        ("none/such.yaml", "above.yaml: base 'none/such.yaml' is no file"),
        ("", "base '' is no file"),
        (5, "base=5 must be the name of a packaged recipe or the path of another"),
        (["demo"], "base=['demo'] must be"),
    ],
)
def test_a_base_that_cannot_be_is_named(tmp_path, base, said):
    assert said in refused(write(tmp_path, "above", {"base": base}))


def test_what_is_wrong_in_a_base_is_said_of_its_file(recipe, tmp_path):
    write(tmp_path, "below", {**recipe, "by_size": {"3B": {"train": {"lrr": 1}}}})
    file = write(tmp_path, "above", {"base": "below.yaml"})
    assert "below.yaml: by_size.3B.train.lrr" in refused(file)
    (tmp_path / "below.yaml").write_text("- a\n")
    assert "below.yaml must hold a mapping" in refused(file)


# Shares


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0, 0], "data.sources: all shares are zero"),
        ([1, -0.5], "data.sources.1.share=-0.5: input should be greater than or equal to 0"),
        ([1, ".nan"], "data.sources.1.share=nan"),
        ([1, ".inf"], "data.sources.1.share=inf"),
    ],
)
def test_shares_that_mix_nothing_are_refused(recipe, tmp_path, shares, said):
    recipe["data"]["sources"] = [{"name": name, "path": "x"} for name in ("a", "b")]
    overrides = [f"data.sources.{number}.share={share}" for number, share in enumerate(shares)]
    assert said in refused(write(tmp_path, "mixed", recipe), *overrides)
