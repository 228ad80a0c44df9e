import signal, threading, time, os
import pytest, torch
from openelm import cli
from openelm.train.checkpoint import Checkpoints
from openelm.train.optim import Optimizer

def test_nan_async(recipe, write_recipe, tmp_path, monkeypatch):
    recipe["train"]["async_checkpoints"] = True
    recipe["train"] |= {"checkpoint_every": 4}
    write = Checkpoints.write_part
    def slow(*a):
        time.sleep(1.0); write(*a)
    monkeypatch.setattr(Checkpoints, "write_part", slow)
    u, n = Optimizer.squares, [0]
    def bad(self):
        n[0] += 1
        return u(self) * (float("nan") if n[0] == 5 else 1)
    monkeypatch.setattr(Optimizer, "squares", bad)
    code = cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path/"run")])
    print("CODE", code, "at return:", os.listdir(tmp_path/"run"/"checkpoints"), threading.enumerate())
    time.sleep(1.5)
    print("later:", os.listdir(tmp_path/"run"/"checkpoints"))
