"""Files written a tensor at a time: safetensors' own reader finds the same, and only one tensor is alive."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openelm.model.safetensors_file import Entry, write_file, write_shards

TENSORS = {
    "packed": torch.arange(12, dtype=torch.int64).to(torch.uint32).reshape(3, 4),
    "gain": torch.linspace(-1, 1, 5),
    "nothing": torch.zeros(0, 4),
    "scales": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "Ümlaut": torch.randn(7, 1, generator=torch.Generator().manual_seed(1)).to(torch.float16),
}


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def test_the_librarys_reader_finds_the_same_tensors_and_metadata(tmp_path):
    file = tmp_path / "it.safetensors"
    write_file(file, entries(TENSORS), iter(TENSORS.values()), {"format": "pt"})
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert file.stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size  # nothing beside them


def test_tensors_are_cast_and_made_contiguous_on_the_way(tmp_path):
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    file = tmp_path / "it.safetensors"
    write_file(file, [Entry("m", (6, 4), torch.bfloat16)], iter([matrix.T]), {})
    assert torch.equal(load_file(file)["m"], matrix.T.to(torch.bfloat16))


def test_a_tensor_is_asked_for_when_the_one_before_is_written(tmp_path):
    alive: list[weakref.ref[torch.Tensor]] = []

    def coming():
        for number in range(6):
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.full((8,), float(number))
            alive.append(weakref.ref(tensor))
            yield tensor

    wanted = [Entry(str(number), (8,), torch.float32) for number in range(6)]
    write_shards(tmp_path, wanted, coming(), 100, {})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6 * 32}
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], torch.full((8,), float(name)))


def test_a_cut_never_leaves_words_askew(tmp_path):
    """Scales of an odd number of 16 bits each: a part that began with the biases would put the next words at byte 2."""
    parts = {
        name: tensor
        for layer in "ab"
        for name, tensor in (
            (f"{layer}.weight", torch.arange(12, dtype=torch.int64).to(torch.uint32)),
            (f"{layer}.scales", torch.ones(3, dtype=torch.bfloat16)),
            (f"{layer}.biases", torch.zeros(3, dtype=torch.bfloat16)),
        )
    }
    for size in range(40, 130):
        write_shards(tmp_path, entries(parts), iter(parts.values()), size, {})
        found = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert all(torch.equal(found[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in parts)
        for file in tmp_path.iterdir():
            file.unlink()


def test_what_would_stand_askew_or_twice_is_our_own_mistake(tmp_path):
    odd = [Entry("half", (3,), torch.float16), Entry("whole", (1,), torch.float32)]
    with pytest.raises(AssertionError, match="whole would stand at byte 6"):
        write_file(tmp_path / "it", odd, iter([]), {})
    with pytest.raises(AssertionError, match="a twice"):
        write_file(tmp_path / "it", [Entry("a", (1,), torch.float32)] * 2, iter([]), {})
    with pytest.raises(AssertionError, match=r"a: \(2,\) for \(1,\)"):
        write_file(tmp_path / "it", [Entry("a", (1,), torch.float32)], iter([torch.ones(2)]), {})
