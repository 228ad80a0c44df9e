"""What only a CUDA device can show: a recorded decoding step, and a host that reads behind it. Skipped without one."""

import pytest
import torch

from openelm.infer.sampling import Sampling
from openelm.infer.texts import Texts
from openelm.infer.torch_decoder import TorchDecoder
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CONFIG = ModelConfig(model_dim=256, num_transformer_layers=4, vocab_size=1000, max_context_length=256)
CLOSE = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    model = OpenELM(CONFIG)
    init_weights(model, seed=1)
    return model.cuda().eval()


def random_ids(count, seed=0):
    return torch.randint(3, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("compile", [False, True])
def test_the_recorded_step_gives_the_logits_of_the_whole_text(model, compile):
    slots = TorchDecoder(model, compile=compile).slots(3, 64)
    texts = [random_ids(n, seed=n) for n in (12, 5, 1)]
    slots.prefill([0, 1, 2], texts)
    for step, rows in enumerate([[0, 1, 2], [0, 1, 2], [2, 0], [1], [0, 1, 2]]):
        new = random_ids(len(rows), seed=50 + step)
        logits_BV = slots.decode(rows, torch.tensor(new, device="cuda"))
        for place, (row, id) in enumerate(zip(rows, new, strict=True)):
            texts[row].append(id)
            with torch.no_grad():
                expected_V = model(torch.tensor([texts[row]], device="cuda"))[0, -1]
            torch.testing.assert_close(logits_BV[place], expected_V, **CLOSE)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=4)])
def test_the_host_that_reads_behind_gets_the_same_tokens(model, sampling):
    texts = []
    for ahead in (True, False):
        slots = TorchDecoder(model).slots(2, 64)
        made = Texts(
            slots, [random_ids(9), random_ids(4)], sampling, [1, 2], vocab_size=1000, device=torch.device("cuda")
        )
        made._ahead = ahead
        texts.append([made.step([0, 1]) for _ in range(20)] + [made.step([1]) for _ in range(10)])
    assert texts[0] == texts[1]
