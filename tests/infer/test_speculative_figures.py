"""The figures of docs/speculative.md: run with ``-m slow -s``, and they are printed."""

import random
import shutil
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.infer import native
from openelm.infer.native import NativeModel, NativeSlots
from openelm.infer.sampling import Sampling, candidates, next_tokens
from openelm.infer.slots import Decoder
from openelm.infer.speculative import Account, Speculation
from openelm.infer.torch_decoder import TorchDecoder
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the CPU decoder is not built"),
    pytest.mark.slow(reason="minutes: two models are trained, and passes of a 270M timed"),
]
PROMPT, TOKENS = 100, 200
WAYS = {
    "greedy": Sampling(),
    "temperature 0.7, top-p 0.95": Sampling(temperature=0.7, top_p=0.95, seed=1),
    "temperature 1": Sampling(temperature=1.0, seed=2),
}
TRAINING = [
    *(
        "data.held_out=0",
        "data.row_length=128",
        "tokenizer.vocab_size=2048",
        "train.steps=300",
        "train.warmup_steps=20",
    ),
    *("train.global_batch=8", "train.micro_batch=8"),
    *(f"train.{what}_every=300" for what in ("checkpoint", "validate", "sample")),
]
SIZES = {
    "model": ["model.model_dim=128", "model.num_transformer_layers=4", "model.head_dim=32"],
    "draft": ["model.model_dim=64", "model.num_transformer_layers=1", "model.head_dim=32"]
    + ["model.qkv_multipliers=[1,1]", "model.ffn_multipliers=[2,2]"],
}


class Trained(NamedTuple):
    folder: Path  # of the model
    model: NativeModel
    draft: NativeModel
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model and a draft of the demo's recipe, 300 steps each, on Python's modules; prompts of those left out."""
    folder: Path = tmp_path_factory.mktemp("figures")
    (folder / "text").mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    left_out = modules[::10]
    for file in set(modules) - set(left_out):
        shutil.copy(file, folder / "text")
    source = f"data.sources=[{{name: python, path: {folder / 'text'}}}]"
    with pytest.MonkeyPatch.context() as patch:
        # Of these runs the weights are wanted, not the roof and the report.
        patch.setattr("openelm.train.run.gemm_flops_per_s", lambda *_, **__: 1e12)
        patch.setattr("openelm.report.page.write_report", lambda run, *_: run / "report" / "index.html")
        for name, size in SIZES.items():
            same = [f"tokenizer.path={folder / 'model' / 'tokenizer'}"] if name == "draft" else []
            run = ["--run", str(folder / name)]
            overrides = [one for one in TRAINING if not (same and one.startswith("tokenizer."))]
            with pytest.raises(SystemExit) as ended:
                cli.main(["pretrain", "demo", *run, source, *overrides, *size, *same])
            assert not ended.value.code
    tokenizer = Tokenizer.load(folder / "model" / "model")
    texts = [tokenizer.encode(file.read_text(encoding="utf-8")) for file in left_out]
    prompts = [ids[len(ids) // 2 :][:PROMPT] for ids in texts if len(ids) > 2 * PROMPT]
    model, draft = (NativeModel.load(folder / name, threads=1) for name in SIZES)
    return Trained(folder / "model" / "model", model, draft, prompts)


def begun(model: NativeModel, prompt: list[int], count: int = TOKENS) -> tuple[NativeSlots, Tensor]:
    """A slot that holds a prompt, with room for so many tokens more, and the logits after it."""
    slots = model.slots(1, len(prompt) + count)
    return slots, slots.prefill([0], [prompt])


def written(slots: NativeSlots, logits_1V: Tensor, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    """What plain decoding writes behind a prompt, an end of text or not."""
    text = list(prompt)
    for _ in range(count - 1):
        text += chosen(logits_1V, sampling, len(text))
        logits_1V = slots.decode([0], text[-1:])
    return [*text[len(prompt) :], *chosen(logits_1V, sampling, len(text))]


def chosen(logits_TV: Tensor, sampling: Sampling, first: int) -> list[int]:
    """The choices behind successive places, of which the first token's is given."""
    T = len(logits_TV)
    positions = torch.arange(first, first + T)
    ids: list[int] = next_tokens(
        logits_TV, sampling, seeds_B=torch.full((T,), sampling.seed), positions_B=positions
    ).tolist()
    return ids


def drafted(
    speculation: Speculation, slots: NativeSlots, logits_1V: Tensor, prompt: list[int], sampling: Sampling, count: int
) -> list[int]:
    """The same, with drafts."""
    text = list(prompt)
    for _ in speculation.steps(slots, 0, logits_1V[0], text, count, sampling, logits_1V.shape[1]):
        pass
    return text[len(prompt) :]


def test_texts_are_the_same_and_what_is_accepted(trained: Trained) -> None:
    parameters = [one.config.num_parameters() for one in (trained.model, trained.draft)]
    print(f"\n{len(trained.prompts)} prompts of {PROMPT} tokens, {TOKENS} written; parameters: {parameters}")
    print(f"{trained.model.description}; draft: {trained.draft.description}")
    model, prompts = trained.model, trained.prompts
    plain = {name: [written(*begun(model, one), one, way, TOKENS) for one in prompts] for name, way in WAYS.items()}
    for kind in ("model", "lookup"):
        for most in (3, 7):
            same = 0
            for name, way in WAYS.items():
                speculation = Speculation(trained.draft if kind == "model" else None, tokens=most)
                texts = [drafted(speculation, *begun(model, one), one, way, TOKENS) for one in prompts]
                same += sum(text == other for text, other in zip(texts, plain[name], strict=True))
                account: Account = speculation.account
                print(f"{kind:6} up to {most}, {name:28} accepted {account.acceptance:.0%}, ", end="")
                print(f"tokens a pass {account.tokens_per_pass:.2f}")
                assert account.accepted
            print(f"{kind:6} up to {most}: {same} of {len(plain) * len(prompts)} texts as without drafts")
            # To four tokens the decoder gives the same bits as to one; to more only nearly.
            assert most > 3 or same == len(plain) * len(prompts)


def test_places_at_which_a_draft_agrees(trained: Trained) -> None:
    """With the same noise, and (1 - D) by accepting and rejecting at random; D is the distance of two distributions."""
    print()
    for name, way in list(WAYS.items())[1:]:
        agree, distances = 0, []
        for prompt in trained.prompts:
            text = prompt + written(*begun(trained.model, prompt), prompt, way, TOKENS)
            ours, theirs = (
                one.slots(1, len(text)).verify(0, text)[PROMPT - 1 : -1] for one in (trained.model, trained.draft)
            )
            pairs = zip(chosen(ours, way, PROMPT), chosen(theirs, way, PROMPT), strict=True)
            agree += sum(one == other for one, other in pairs)
            distances += ((spread(ours, way) - spread(theirs, way)).abs().sum(-1) / 2).tolist()
        share, least = agree / len(distances), statistics.mean((1 - D) / (1 + D) for D in distances)
        print(f"{name}: {share:.2f} of {len(distances)} places agree, 1 - D is {1 - statistics.mean(distances):.2f}")
        assert least - 0.05 < share <= 1 - statistics.mean(distances) + 0.05  # of draws


def spread(logits_TV: Tensor, sampling: Sampling) -> Tensor:
    """The (T, V) probabilities that are drawn from."""
    logits_TC, ids_TC = candidates(logits_TV, sampling)
    return torch.zeros_like(logits_TV).scatter(1, ids_TC, logits_TC.softmax(-1))


# What it costs where a pass costs something


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A 270M of random weights."""
    folder: Path = tmp_path_factory.mktemp("large") / "model"
    model = OpenELM(ModelConfig.from_name("270M"))
    init_weights(model, seed=0)
    save_model(model, folder, dtype=torch.bfloat16)
    del model
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("bits", [None, 4])
def test_cost_of_a_pass_over_several_tokens(large: Path, bits: int | None) -> None:
    """CPU time of one thread, at context 200, in turns."""
    model = NativeModel.load(large, bits=bits, threads=1)
    slots, rounds = model.slots(1, 256), 5
    slots.prefill([0], [[7] * 200])
    times: dict[int, list[float]] = {count: [] for count in (1, 4, 8)}
    for _ in range(rounds + 1):
        for count, found in times.items():
            start_s = time.process_time()
            slots.verify(0, list(range(count)))
            found.append(time.process_time() - start_s)
            slots.truncate(0, 200)
    print(f"\n{model.description}; of {rounds} each, after one that is not counted:")
    one_s = statistics.median(times[1][1:])
    for count, (_, *found) in times.items():
        ratios = [seconds / one_s for seconds in found]
        print(f"{count} tokens: {statistics.median(ratios):.2f} of a pass over one ", end="")
        print(f"({min(ratios):.2f} to {max(ratios):.2f}), {1000 * statistics.median(found):.1f} ms")
        assert statistics.median(ratios) < max(count, 1.01)


class Oracle:
    """Drafts from what plain decoding wrote, each right with a probability."""

    def __init__(self, truth: list[int], right: float) -> None:
        self._truth, self._right, self._draw = truth, right, random.Random(0)

    def propose(self, text: list[int], count: int) -> list[int]:
        ids = self._truth[len(text) : len(text) + count]
        return [id if self._draw.random() < self._right else 1 - min(id, 1) for id in ids]


@pytest.mark.parametrize(("bits", "longest"), [(None, (3,)), (4, (3, 7))])
def test_speed_with_drafts_that_cost_nothing(
    large: Path, bits: int | None, longest: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU time of one thread, behind a prompt of 200, greedy: each once. In bf16 seven may write another text."""
    model, prompt, count = NativeModel.load(large, bits=bits, threads=1), [7 + n for n in range(200)], 80
    begin = begun(model, prompt, count)
    start_s = time.process_time()
    truth = written(*begin, prompt, Sampling(), count)
    plain_s = time.process_time() - start_s
    print(f"\n{model.description}; {count} tokens, without drafts {count / plain_s:.0f} a second")
    for right in (0.5, 0.7, 0.9, 1.0):
        for most in longest:
            speculation, oracle = Speculation(tokens=most), Oracle([*prompt, *truth], right)
            monkeypatch.setattr(speculation, "_begin", lambda *_, oracle=oracle: oracle)
            begin = begun(model, prompt, count)
            start_s = time.process_time()
            text = drafted(speculation, *begin, prompt, Sampling(), count)
            ratio = plain_s / (time.process_time() - start_s)
            print(f"{right:.0%} right, up to {most}: {ratio:.2f} times as fast, ", end="")
            print(f"tokens a pass {speculation.account.tokens_per_pass:.2f}")
            assert text == truth


# Rounding


def test_rounding_of_a_pass_over_several_tokens(trained: Trained, large: Path) -> None:
    """Logits of a pass, against those of one token after the other: the largest difference, in standard deviations."""
    models: dict[str, tuple[Decoder, list[list[int]]]] = {
        "native, bf16": (trained.model, trained.prompts),
        "native, bf16, 270M of random weights": (NativeModel.load(large, threads=1), trained.prompts[:2]),
    }
    for dtype in (torch.float32, torch.bfloat16):
        decoder = TorchDecoder(load_model(trained.folder, dtype=dtype))
        models[f"torch, {dtype}"] = decoder, trained.prompts
    print()
    for name, (model, prompts) in models.items():
        for count in (4, 8):
            found = [rounding(model, prompt, count) for prompt in prompts]
            print(f"{name}, {count} tokens: the same bits in {found.count(0)} of {len(found)} passes", end=", ")
            print(f"else within {max(found):.1g}")
            assert max(found) < 0.2
            assert name.startswith("torch") or count > 4 or max(found) == 0


def rounding(model: Decoder, prompt: list[int], count: int) -> float:
    slots, last = model.slots(2, PROMPT), prompt[PROMPT - count : PROMPT]
    for slot in (0, 1):
        slots.prefill([slot], [prompt[: PROMPT - count]])
    one_by_one = torch.cat([slots.decode([0], torch.tensor([id])).clone() for id in last])
    return float((slots.verify(1, last) - one_by_one).abs().max() / one_by_one.std())
