"""Checkpoints of several ranks, and saving beside training: the same bits whoever wrote them, killed at any instant."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from openelm.errors import UserError
from openelm.files import remove_drafts
from openelm.model import stored
from openelm.model.folder import load_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights
from openelm.train import checkpoint as checkpoint_module
from openelm.train.average import Average
from openelm.train.checkpoint import (
    Checkpoint,
    Checkpoints,
    Opened,
    Part,
    Slice,
    check_geometry,
    new_attempt,
    open_checkpoint,
    read_weights,
    verify,
)
from openelm.train.form import Form
from openelm.train.saving import Saver

# 19 rows of vocabulary: no number of ranks from 2 to 8 divides them.
CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=19
)
RANKS = 4


def make(step: int) -> Checkpoint:
    model = OpenELM(CONFIG)
    init_weights(model, step)
    draw = torch.Generator().manual_seed(step)
    weights = model.state_dict()
    optimizer = {f"{n}.exp_avg": torch.randn(t.shape, generator=draw) for n, t in weights.items()}
    optimizer |= {f"{n}.step": torch.tensor(float(step)) for n in weights}
    return Checkpoint(step, weights, optimizer, {"tokens": 100 * step})


def dealt(tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, Slice]:
    """The rows of a rank as FSDP2 deals them: torch.chunk, and nothing for those who come after the last row."""
    slices = {}
    for name, tensor in tensors.items():
        if not tensor.dim():
            if rank == 0:
                slices[name] = Slice.whole(tensor)
            continue
        chunks = tensor.chunk(ranks)
        first = sum(len(chunk) for chunk in chunks[:rank])
        own = chunks[rank] if rank < len(chunks) else tensor[:0]
        slices[name] = Slice(own, first, tuple(tensor.shape))
    return slices


def part_of(checkpoint: Checkpoint, rank: int, ranks: int) -> Part:
    weights, optimizer = (dealt(t, rank, ranks) for t in (checkpoint.weights, checkpoint.optimizer))
    return Part(checkpoint.step, weights, optimizer, {"rank": rank, **(checkpoint.state if rank == 0 else {})})


def write(checkpoints: Checkpoints, step: int, ranks: int = RANKS, attempt: str = "") -> Path:
    attempt = attempt or new_attempt()
    for rank in reversed(range(ranks)):  # the first rank need not be the first to write
        checkpoints.write_part(Form(CONFIG), part_of(make(step), rank, ranks), rank, ranks, attempt)
    return checkpoints.publish(step, ranks, attempt)


def write_part(checkpoints: Checkpoints, rank: int, ranks: int, part: Part) -> None:
    checkpoints.write_part(Form(CONFIG), part, rank, ranks, "a")


def assert_same(opened: Opened, expected: Checkpoint, readers: int) -> None:
    """Rows read by each of `readers` ranks, put together, are the tensors that were saved."""
    for read, tensors in ((opened.read_weight, expected.weights), (opened.read_optimizer, expected.optimizer)):
        for name, tensor in tensors.items():
            if not tensor.dim():
                assert torch.equal(read(name), tensor)
                continue
            for rank in range(readers):
                own = dealt({name: tensor}, rank, readers)[name]
                found = read(name, own.first_row, len(own.tensor))
                assert found.dtype == tensor.dtype
                assert torch.equal(found, own.tensor), (name, rank)


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    found = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step in (5, 10):
        write(found, step)
    return found


def hidden(folder: Path) -> list[Path]:
    return [*folder.rglob(".*"), *folder.rglob("sums-*")]


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("writers", [1, 2, 4, 7])
def test_what_some_ranks_saved_any_other_number_reads_to_the_bit(tmp_path, writers, readers):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 5, writers)
    opened = checkpoints.open()
    assert opened.step == 5
    assert [state["rank"] for state in opened.states()] == list(range(writers))
    assert opened.states()[0]["tokens"] == 500
    assert_same(opened, make(5), readers)


def test_a_rank_without_any_row_writes_its_files_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    path = write(checkpoints, 5, 24)  # more than the vocabulary has rows
    assert_same(checkpoints.open(), make(5), 3)
    assert len(list(path.glob("model-*-of-00024.safetensors"))) == 24
    with safe_open(path / "model-00024-of-00024.safetensors", framework="pt") as last:
        assert "transformer.token_embeddings.weight" not in set(last.keys())


def test_a_checkpoint_of_several_ranks_opens_as_a_model_and_as_a_whole(checkpoints):
    expected = make(10)
    model = load_model(checkpoints.path(10))
    assert all(torch.equal(t, expected.weights[name]) for name, t in model.state_dict().items())
    config, weights = read_weights(checkpoints.path(10))
    assert config.ffn_dims == CONFIG.ffn_dims
    loaded = checkpoints.load()
    for found, wanted in ((weights, expected.weights), (loaded.weights, expected.weights)):
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert loaded.optimizer.keys() == expected.optimizer.keys()
    assert all(torch.equal(loaded.optimizer[name], tensor) for name, tensor in expected.optimizer.items())
    assert (loaded.step, loaded.state["tokens"]) == (10, 1000)


def test_only_the_rows_asked_for_are_held(checkpoints):
    rows = checkpoints.open().read_weight("token_embeddings.weight", 3, 2)
    assert rows.untyped_storage().nbytes() == 2 * 32 * 4
    assert torch.equal(rows, make(10).weights["token_embeddings.weight"][3:5])
    with pytest.raises(UserError, match=r"holds no tensor ema\.norm\.weight"):
        checkpoints.open().read_optimizer("ema.norm.weight")


def test_the_mean_is_read_from_checkpoints_of_different_ranks(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step, ranks in ((5, 1), (10, 4), (15, 3)):
        write(checkpoints, step, ranks)
    average = Average(checkpoints, checkpoints.steps()[-3:])
    assert average.steps == [5, 10, 15]
    for name in make(5).weights:
        each = torch.stack([make(step).weights[name].double() for step in average.steps])
        assert torch.equal(average.read(name), each.mean(0).float()), name


def names(ranks: int) -> list[str]:
    found = ["config.json", "generation_config.json", "manifest.json", "state.json"]
    found += [
        f"{stem}-{n:05}-of-{ranks:05}.safetensors" for stem in ("model", "optimizer") for n in range(1, ranks + 1)
    ]
    return sorted([*found, *(f"state-{n:05}-of-{ranks:05}.json" for n in range(2, ranks + 1))])


@pytest.mark.parametrize("name", names(RANKS))
@pytest.mark.parametrize("how", ["one bit", "cut short", "removed"])
def test_damage_to_any_file_is_named_whoever_looks_at_it(checkpoints, name, how):
    folder = checkpoints.path(10)
    assert sorted(path.name for path in folder.iterdir()) == names(RANKS)
    file = folder / name
    content = file.read_bytes()
    middle = len(content) // 2
    if how == "removed":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    refusals = []
    for rank in range(3):
        try:
            checkpoints.open(share=(rank, 3))
        except UserError as error:
            refusals.append(str(error))
    assert refusals, "each file is in the share of one of three ranks"
    for text in refusals:
        assert "damaged checkpoint" in text
        assert "step_00000010" in text
        assert "--resume-step 5" in text
    # A bit of the manifest may be one of any file's checksum.
    assert name == "manifest.json" or any(str(file) in text for text in refusals)
    assert checkpoints.open(5).step == 5


def test_without_checksums_too_a_model_of_missing_or_doubled_rows_is_refused(checkpoints):
    folder = checkpoints.path(10)
    parts = [folder / f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    second, third = (part.read_bytes() for part in parts[1:3])
    parts[1].write_bytes(third)
    with pytest.raises(UserError, match=r"model-0000\d-of-00004\.safetensors holds .* from row \d+ on, and rows of it"):
        load_model(folder)
    parts[1].write_bytes(second)
    parts[2].write_bytes(second)
    with pytest.raises(UserError, match=r"these stand elsewhere too"):
        load_model(folder)
    parts[2].write_bytes(third)
    parts[3].unlink()
    with pytest.raises(UserError, match=r"lacks model-00004-of-00004\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("missing", range(RANKS))
def test_a_part_that_is_not_there_is_named_and_no_checkpoint_appears(checkpoints, missing):
    for rank in set(range(RANKS)) - {missing}:
        checkpoints.write_part(Form(CONFIG), part_of(make(15), rank, RANKS), rank, RANKS, "now")
    with pytest.raises(UserError, match=rf"part of rank {missing + 1} of 4 is not in .*step_00000015.*one file system"):
        checkpoints.publish(15, RANKS, "now")
    assert checkpoints.steps() == [5, 10]
    assert hidden(checkpoints.folder) == []


def test_what_an_attempt_before_left_is_not_mixed_in(checkpoints):
    # Killed with the parts of ranks 2 and 4 of four on disk, of other weights; the next attempt is of three ranks.
    for rank in (1, 3):
        checkpoints.write_part(Form(CONFIG), part_of(make(99), rank, RANKS), rank, RANKS, "before")
    remains = checkpoints.folder / ".step_00000015.tmp-part-before"
    (checkpoints.folder / ".step_00000099.tmp-part-before").rename(remains)
    write(checkpoints, 15, 3)
    assert_same(checkpoints.open(), make(15), 2)
    assert remains.is_dir()
    remove_drafts(checkpoints.folder)
    assert hidden(checkpoints.folder) == []


def test_a_checkpoint_is_written_again_by_another_number_of_ranks(checkpoints):
    before = checkpoints.path(10)
    assert (before / "model-00004-of-00004.safetensors").is_file()
    write(checkpoints, 10, 2)
    assert sorted(path.name for path in before.iterdir()) == names(2)
    assert_same(checkpoints.open(), make(10), 3)
    assert hidden(checkpoints.folder) == []


def test_a_part_that_does_not_fit_is_named_and_given_up(checkpoints, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints.write_part(Form(CONFIG), part_of(make(15), 0, 2), 0, 2, "now")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"no space left for .*step_00000015"):
            checkpoints.write_part(Form(CONFIG), part_of(make(15), 1, 2), 1, 2, "now")
    checkpoints.discard(15, "now")
    assert hidden(checkpoints.folder) == []
    assert_same(checkpoints.open(), make(10), 1)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_named(checkpoints, monkeypatch, number):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no permission stops
    with pytest.raises(UserError, match=r"step_00000015 cannot be written"):
        checkpoints.write_part(Form(CONFIG), part_of(make(15), 1, 2), 1, 2, "now")


def test_another_geometry_is_refused_with_every_field_that_differs(checkpoints):
    path = checkpoints.path(10)
    check_geometry(CONFIG, path)
    # Said otherwise, but the same widths; how long a text may be changes no weight.
    check_geometry(CONFIG.changed(ffn_multipliers=CONFIG.betas, max_context_length=64), path)
    other = CONFIG.changed(vocab_size=20, rope_freq_constant=5000)
    said = r"another geometry: vocab_size is 19 there and 20 here; rope_freq_constant is 10000 there and 5000 here"
    with pytest.raises(UserError, match=said):
        check_geometry(other, path)


def start_child(work: Callable[[], Any]) -> int:
    """Start `work` in a forked process that ends without cleaning up: with 0 at its end, 1 after an error."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("ranks", "step"), [(1, 15), (2, 15), (2, 10)], ids=["alone", "two ranks", "over an old one"])
def test_killed_before_any_of_its_steps_it_leaves_a_complete_checkpoint_and_no_trace(tmp_path, ranks, step):
    original = tmp_path / "original"
    for before in (5, 10):
        write(Checkpoints(original, keep_last=2), before, 2)
    torch.set_num_threads(1)
    folder, moments = tmp_path / "checkpoints", []

    def killed_at(moment: int) -> int:
        def work() -> None:
            count = 0

            def watch(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal count
                changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
                if changes or (event == "open" and str(folder) in str(arguments[0])):
                    count += 1
                    if count == moment:
                        os._exit(9)

            sys.addaudithook(watch)
            write(Checkpoints(folder, keep_last=2), step, ranks, "attempt")

        return exit_code(start_child(work))

    for moment in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        code = killed_at(moment)
        remove_drafts(folder)
        assert hidden(folder) == []
        checkpoints = Checkpoints(folder, keep_last=2)
        newest = checkpoints.steps()[-1]
        assert newest in (10, step)
        moments.append(newest)
        assert_same(checkpoints.open(), make(newest), 1)
        if code == 0:
            break
        assert code == 9
    assert code == 0 and len(moments) > 20, "the last was not killed"
    assert moments == sorted(moments) and moments[-1] == step


@pytest.mark.slow(reason="200 writers killed at random instants: a minute")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_instants_there_is_always_a_complete_newest_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, milestone_every=7)
    draw = random.Random(1)
    write(checkpoints, 1)
    last, killed = 1, 0

    def work() -> None:
        for step in range(last + 1, last + 100):
            write(checkpoints, step, 1 + step % 4)

    for _ in range(200):
        child = start_child(work)
        time.sleep(draw.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        killed += bool(list(checkpoints.folder.glob(".step_*")))
        remove_drafts(checkpoints.folder)
        assert hidden(checkpoints.folder) == []
        for step in checkpoints.steps():
            verify(checkpoints.path(step))
        newest = checkpoints.steps()[-1]
        assert newest >= last
        assert_same(checkpoints.open(), make(newest), 1)
        last = newest
    assert killed > 100, "most were killed while they wrote"
    assert last > 20, "some were not"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_bits_are_those_of_the_call_whatever_happens_afterwards(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    saver = Saver(asynchronous=asynchronous)
    go_on = threading.Event()
    for step in (5, 10):
        now = make(step)
        part = part_of(now, 0, 1)

        def work(part: Part) -> None:
            assert not asynchronous or go_on.wait(20)
            checkpoints.write_part(Form(CONFIG), part, 0, 1, "a")

        go_on.clear()
        saver.save(part, work)
        assert saver.done() is not asynchronous
        for tensor in (*now.weights.values(), *now.optimizer.values()):
            tensor.fill_(float("nan"))
        part.state["tokens"] = -1
        go_on.set()
        saver.wait()
        assert saver.done()
        checkpoints.publish(step, 1, "a")
        opened = open_checkpoint(checkpoints.path(step))
        assert opened.states()[0]["tokens"] == 100 * step
        assert_same(opened, make(step), 1)


def test_both_ways_of_saving_write_the_same_bytes(tmp_path):
    manifests = []
    for asynchronous in (True, False):
        checkpoints = Checkpoints(tmp_path / str(asynchronous), keep_last=9)
        saver = Saver(asynchronous=asynchronous)
        for rank in range(2):
            saver.save(part_of(make(5), rank, 2), partial(write_part, checkpoints, rank, 2))
            saver.wait()
        manifests.append(json.loads((checkpoints.publish(5, 2, "a") / "manifest.json").read_text()))
    assert manifests[0] == manifests[1]


def test_one_save_is_under_way_at_a_time_and_its_buffers_are_used_again():
    saver, go_on, seen = Saver(asynchronous=True), threading.Event(), []

    def work(part: Part) -> None:
        go_on.wait(20)
        tensors = {**part.weights, **part.optimizer}
        seen.append((part.step, {name: piece.tensor.data_ptr() for name, piece in tensors.items()}))

    saver.save(part_of(make(1), 0, 1), work)
    threading.Timer(0.2, go_on.set).start()
    start_s = time.perf_counter()
    saver.save(part_of(make(2), 0, 1), work)
    assert time.perf_counter() - start_s > 0.1, "the second waited for the first"
    assert [step for step, _ in seen][:1] == [1]
    saver.wait()
    assert [step for step, _ in seen] == [1, 2]
    assert seen[0][1] == seen[1][1]
    larger = part_of(make(3), 0, 1)
    grown = Slice.whole(torch.ones(99))
    saver.save(Part(3, {"new": grown}, larger.optimizer, {}), work)
    saver.wait()
    assert seen[2][1].keys() == {"new", *larger.optimizer}
    assert saver._buffers.keys() == {"weights new", *(f"optimizer {name}" for name in larger.optimizer)}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_the_writer_raises_comes_out_once_where_it_is_asked_for(asynchronous):
    saver = Saver(asynchronous=asynchronous)

    def full(part: Part) -> None:
        raise UserError(f"no space left for step {part.step}")

    saver.save(part_of(make(1), 0, 1), full)
    while not saver.done():
        time.sleep(0.01)
    with pytest.raises(UserError, match="no space left for step 1"):
        saver.result()
    saver.result()
    saver.wait()
    saver.save(part_of(make(2), 0, 1), full)
    with pytest.raises(UserError, match="no space left for step 2"):  # at the latest by the next save
        saver.save(part_of(make(3), 0, 1), lambda part: None)
    saver.save(part_of(make(3), 0, 1), lambda part: None)
    saver.wait()


def test_a_state_that_is_no_plain_data_is_refused_in_the_step_that_made_it():
    part = Part(1, {}, {}, {"stream": torch.ones(1)})
    with pytest.raises(TypeError, match="not JSON serializable"):
        Saver(asynchronous=True).save(part, lambda part: None)


def test_a_reader_keeps_few_files_open(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 5, 7)
    opened: list[Any] = []

    class Counting:
        def __init__(self, file: Any, **kind: Any) -> None:
            self._file = safe_open(file, **kind)
            opened.append(file)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            return self._file.__enter__()

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

    monkeypatch.setattr(stored, "OPEN_FILES", 2)
    monkeypatch.setattr(stored, "safe_open", Counting)
    reader = checkpoint_module.Opened(checkpoints.path(5))
    assert_same(reader, make(5), 2)
    assert len(reader._weights._opened) <= 2
    assert len(opened) > 14, "files were closed and opened again"
