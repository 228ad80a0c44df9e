"""The templates of launch/ and the commands of docs/launch.md: they are parsed, and run on gloo ranks on loopback."""

import argparse
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.commands import pretrain
from openelm.config import RunConfig, load_recipe

pytestmark = pytest.mark.skipif(os.name == "nt", reason="bash, and distributed training")
ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GUIDE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
# Long enough for a machine that does much else; a run takes a few seconds, importing torch the rest.
PATIENCE_S = 180


def parsed(command: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """What torchrun, and then openelm, understand of a command line."""
    from torch.distributed.run import get_args_parser

    torchrun = get_args_parser().parse_args(command[1:])
    assert torchrun.module and torchrun.training_script == "openelm"
    assert torchrun.training_script_args[0] == "pretrain"
    parser = argparse.ArgumentParser()
    pretrain.add_arguments(parser)
    arguments = parser.parse_intermixed_args(torchrun.training_script_args[1:])
    assert arguments.run and arguments.auto_resume
    return torchrun, load_recipe(arguments.recipe, arguments.overrides)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_sound_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True).stderr == ""


def test_commands_of_the_guide_are_understood() -> None:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("torchrun ")]
    found = [parsed(command) for command in commands]
    assert {(torchrun.nnodes, torchrun.nproc_per_node) for torchrun, _ in found} == {
        ("1:1", "8"),
        ("2", "8"),
        ("1:2", "8"),
    }
    assert all(torchrun.rdzv_id != "none" for torchrun, _ in found if torchrun.nnodes != "1:1")


def test_kubernetes_template_is_understood() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    [container] = pod["containers"]
    torchrun, config = parsed([*container["command"], *container["args"]])
    assert container["name"] == "pytorch" and worker["restartPolicy"] == "OnFailure"
    assert int(torchrun.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    ranks = int(torchrun.nproc_per_node) * worker["replicas"]
    assert config.train.global_batch % (ranks * config.train.micro_batch) == 0
    assert job["spec"]["elasticPolicy"]["minReplicas"] <= worker["replicas"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_example_of_the_troubleshooting_page_shows_the_batch_that_stands_out(
    recipe, write_recipe, tmp_path, monkeypatch, capsys
) -> None:
    """A run whose rows are recorded as after a spike; one batch of them is then made into nonsense."""
    run = tmp_path / "runs" / "demo"
    recipe["train"] |= {"steps": 60, "spike_deviations": 0.001}
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run)]) == 0
    events = [entry for entry in entries(run) if entry["kind"] == "guard"]
    [*_, file] = sorted(run.glob("replay/step_*.json"))
    assert events and file.name == Path(events[-1]["replay"].replace("*", "00000")).name
    replay = json.loads(file.read_text())
    rows = replay["batches"][1]["targets"]
    replay["batches"][1]["targets"] = [[399 - id if id >= 0 else id for id in row] for row in rows]
    file.write_text(json.dumps(replay))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(file.name)]
    losses = [float(re.fullmatch(rf"{file.name} batch {i}: ([\d.]+) nats a token", x)[1]) for i, x in enumerate(lines)]
    assert len(losses) == 2 and 0 < losses[0] < 5 < losses[1]  # ln(400) is 6


@pytest.mark.parametrize("page", ["launch.md", "troubleshooting.md"])
def test_pages_name_only_what_there_is(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for section, name in re.findall(r"\b(train|data)\.([a-z_]+)", text):
        fields = RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert name in fields or (section, name) == ("data", "md"), f"{section}.{name}"
    assert set(re.findall(r"`openelm ([a-z]+)", text)) <= set(cli.COMMANDS)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


# Really run


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for the PATH: torchrun of this Python, and what stands for Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',  # a signal to srun reaches the task
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"{tmp_path}/scontrol.log"; fi',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def start(tools: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a template, as ``start(name of its log, script, arguments, variables)``. Whatever it started ends here."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, script: str, arguments: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "SLURM_", "TORCH"))}
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        # The host's own name may lead nowhere.
        env = {**own, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "PET_LOCAL_ADDR": "127.0.0.1", **env}
        with (tmp_path / f"{name}.log").open("ab") as log:
            command = ["bash", str(LAUNCH / script), *arguments]
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        for pid in [process.pid, *below(process.pid)]:  # ranks have sessions of their own
            kill(pid)
        process.wait()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [child for parent, child in pairs if parent == pid]


def below(pid: int) -> list[int]:
    """All processes that descend from one, parents first."""
    found = [pid]
    for one in found:
        found += children_of(one)
    return found[1:]


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The ranks that a torchrun.sh has started, which are the children of its only child."""
    [torchrun] = children_of(process.pid)
    return children_of(torchrun)


def wait_for(there: Callable[[], Any], logs: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < deadline_s, said(logs)
        time.sleep(0.05)


def ends(process: subprocess.Popen[bytes], logs: Path) -> int:
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(said(logs)) from None


def said(logs: Path) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(logs.glob("*.log")))


def has_checkpoint(run: Path) -> Callable[[], bool]:
    return lambda: any(run.glob("checkpoints/step_*"))


def entries(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in found]


def check_equal(run: Path, alone: Path) -> None:
    """The run is the one that never stopped, within what summing over ranks rounds."""
    one, other = ([e for e in entries(folder) if e["kind"] == "train"] for folder in (alone, run))
    assert [e["step"] for e in other] == [e["step"] for e in one], "each step once"
    assert [e["tokens"] for e in other] == [e["tokens"] for e in one]
    assert [e["loss"] for e in other] == pytest.approx([e["loss"] for e in one], rel=1e-3)
    data = [[e for e in entries(folder) if e["kind"] == "data"] for folder in (alone, run)]
    assert data[0] == data[1]
    assert (run / "model" / "model.safetensors").is_file()


@pytest.fixture
def long_recipe(recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path) -> Callable[[int], str]:
    """A run of so many steps, made without a stop in ``alone``; gives its recipe."""

    def make(steps: int) -> str:
        recipe["train"] |= {"steps": steps, "checkpoint_every": 20, "timeout_s": 60, "sample_prompts": []}
        recipe["train"] |= {"validate_every": 10_000, "sample_every": 10_000}
        file = write_recipe(recipe)
        assert cli.run(["pretrain", file, "--run", str(tmp_path / "alone")]) == 0
        return file

    return make


@pytest.fixture
def port() -> int:
    """Of those that slurm.sbatch chooses among, a free one."""
    for number in random.sample(range(20000, 30000), 100):
        if not listens(number):
            return number
    raise AssertionError("no free port")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def nodes(start: Callable[..., Any], port: int) -> Callable[..., Any]:
    """Start one of two nodes of one rank, as ``nodes("name", arguments)``: they meet at the port."""

    def begin(name: str, arguments: list[str], nnodes: str = "2") -> Any:
        env = {"PET_NNODES": nnodes, "PET_NPROC_PER_NODE": "1", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}"}
        env |= {"PET_RDZV_ID": "test", "PET_MAX_RESTARTS": "3"}
        return start(name, "torchrun.sh", arguments, env)

    return begin


def test_two_nodes_train_through_the_death_of_a_rank(long_recipe, nodes, tmp_path) -> None:
    file, run = long_recipe(120), tmp_path / "run"
    both = [nodes(name, [file, "--run", str(run)]) for name in ("first", "second")]
    wait_for(has_checkpoint(run), tmp_path)
    [rank] = ranks_of(both[1])
    os.kill(rank, signal.SIGKILL)
    assert [ends(node, tmp_path) for node in both] == [0, 0], said(tmp_path)
    check_equal(run, tmp_path / "alone")
    text = said(tmp_path)
    assert "failed (exitcode: -9)" in text and len(re.findall(r"on 2 ranks of cpu, from step \d+", text)) == 1


def test_slurm_job_requeues_itself_and_goes_on_to_the_same_bits(long_recipe, start, port, tmp_path) -> None:
    file, run = long_recipe(400), tmp_path / "run"
    env = {"SLURM_JOB_ID": str(port), "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}  # one rank
    env |= {"SLURM_JOB_NODELIST": "node[1-1]", "SLURM_CPUS_PER_TASK": "1"}
    job = start("job", "slurm.sbatch", [file, "--run", str(run)], env)
    wait_for(has_checkpoint(run), tmp_path)
    job.send_signal(signal.SIGUSR1)
    assert ends(job, tmp_path) == 0, said(tmp_path)
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {port}\n"
    last = max(int(folder.name[5:]) for folder in run.glob("checkpoints/step_*"))
    assert last == entries(run)[-1]["step"] < 400 and not (run / "summary.json").exists()
    job = start("job", "slurm.sbatch", [file, "--run", str(run)], {**env, "SLURM_RESTART_COUNT": "1"})
    assert ends(job, tmp_path) == 0, said(tmp_path)
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {port}\n"
    assert entries(run) == entries(tmp_path / "alone")


def test_slurm_job_that_fails_is_not_requeued(start, tmp_path) -> None:
    """The torchrun of this test leaves at once, with the code of a failure."""
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/sh\necho "$PET_NNODES $PET_RDZV_ENDPOINT $*"; exit 1\n')
    env = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "x"}
    job = start("job", "slurm.sbatch", ["demo", "--run", "somewhere"], env)
    assert ends(job, tmp_path) == 1
    assert not (tmp_path / "scontrol.log").exists()
    expected = "3 127.0.0.1:20005 -m -- openelm pretrain demo --run somewhere --auto-resume\n"
    assert (tmp_path / "job.log").read_text() == expected


SIX_STARTS = "starts torch six times and more, half a minute"


@pytest.mark.slow(reason=SIX_STARTS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_torchrun_that_is_asked_to_stop_leaves_with_75_and_goes_on(long_recipe, start, tmp_path, name) -> None:
    """SIGTERM to the script alone, SIGUSR1 to every process as some clusters send it, SIGHUP as a terminal does."""
    file, run = long_recipe(200), tmp_path / "run"
    for stop in (True, False):
        process = start("node", "torchrun.sh", [file, "--run", str(run)], {"PET_NPROC_PER_NODE": "2"})
        if stop:
            wait_for(has_checkpoint(run), tmp_path)
            others = {"SIGTERM": [], "SIGUSR1": below(process.pid), "SIGHUP": children_of(process.pid)}[name]
            for pid in [process.pid, *others]:
                os.kill(pid, getattr(signal, name))
        assert ends(process, tmp_path) == (75 if stop else 0), said(tmp_path)
    check_equal(run, tmp_path / "alone")


@pytest.mark.slow(reason=SIX_STARTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_torchrun_starts_ranks_again_when_one_of_them_leaves(long_recipe, start, tmp_path, number) -> None:
    file, run = long_recipe(200), tmp_path / "run"
    process = start("node", "torchrun.sh", [file, "--run", str(run)], {"PET_NPROC_PER_NODE": "2"})
    wait_for(has_checkpoint(run), tmp_path)
    os.kill(ranks_of(process)[-1], number)
    assert ends(process, tmp_path) == 0, said(tmp_path)
    check_equal(run, tmp_path / "alone")


@pytest.mark.slow(reason=SIX_STARTS)
def test_two_nodes_that_are_both_asked_to_stop_go_on_later(long_recipe, nodes, tmp_path) -> None:
    file, run = long_recipe(200), tmp_path / "run"
    for stop in (True, False):
        both = [nodes(name, [file, "--run", str(run)]) for name in ("first", "second")]
        if stop:
            wait_for(has_checkpoint(run), tmp_path)
            for node in both:
                node.send_signal(signal.SIGTERM)
        assert [ends(node, tmp_path) for node in both] == ([75, 75] if stop else [0, 0]), said(tmp_path)
    check_equal(run, tmp_path / "alone")


@pytest.mark.slow(reason=SIX_STARTS)
@pytest.mark.parametrize("nnodes", ["2", "1:2"])
def test_a_node_that_is_lost_is_waited_for_or_done_without(long_recipe, nodes, port, tmp_path, nnodes) -> None:
    """The node that is lost is not the one that the others meet at; with a range of nodes the other goes on alone."""
    file, run = long_recipe(300), tmp_path / "run"
    first = nodes("first", [file, "--run", str(run)], nnodes)
    wait_for(lambda: listens(port), tmp_path)
    second = nodes("second", [file, "--run", str(run)], nnodes)
    wait_for(has_checkpoint(run), tmp_path)
    for pid in [second.pid, *below(second.pid)]:
        kill(pid)
    if nnodes == "2":
        second = nodes("third", [file, "--run", str(run)], nnodes)
        assert ends(second, tmp_path) == 0, said(tmp_path)
    assert ends(first, tmp_path) == 0, said(tmp_path)
    check_equal(run, tmp_path / "alone")


def test_what_is_refused_is_not_taken_for_a_stop(long_recipe, start, tmp_path) -> None:
    file = long_recipe(20)
    arguments = [file, "train.micro_batch=3", "--run", str(tmp_path / "run")]
    process = start("node", "torchrun.sh", arguments, {"PET_NPROC_PER_NODE": "2"})
    assert ends(process, tmp_path) == 1
    assert said(tmp_path).count("train.global_batch=4 rows is not a multiple of train.micro_batch=3") >= 4  # tries
