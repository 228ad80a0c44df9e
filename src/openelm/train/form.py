"""What a run's trained weights are in files: a whole model, or an adapter beside the geometry of its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openelm.interop import adapter as peft_files
from openelm.interop.adapter import Adapter
from openelm.model.folder import load_config, open_tensors, tensor_shapes, write_config, write_model
from openelm.model.geometry import ModelConfig
from openelm.model.stored import StoredTensors, safetensors_files, to_folder_name


@dataclass(frozen=True)
class Form:
    """``config`` is the geometry of the model; with ``adapter`` only what that adds to it is trained and stored."""

    config: ModelConfig
    adapter: Adapter | None = None
    base: str = ""  # what the adapter belongs to

    @property
    def stem(self) -> str:
        """How the files of the weights begin."""
        return "model" if self.adapter is None else "adapter_model"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name inside the package -> shape of each tensor that is trained."""
        return tensor_shapes(self.config) if self.adapter is None else peft_files.shapes(self.adapter, self.config)

    def file_name(self, name: str) -> str:
        """What the files call a tensor."""
        return to_folder_name(name) if self.adapter is None else peft_files.to_file_name(name)

    def describe(self, folder: Path) -> list[Path]:
        """Write all but the tensors: config.json, generation_config.json, and an adapter's adapter_config.json."""
        write_config(folder, self.config, torch.float32)
        files = [folder / "config.json", folder / "generation_config.json"]
        if self.adapter is not None:
            peft_files.write_config(folder, self.adapter, self.base)
            files.append(folder / peft_files.CONFIG)
        return files

    def write(self, folder: Path, read: Callable[[str], Tensor]) -> None:
        """Write a folder that others open: of a model, or of an adapter (PEFT's, and config.json beside it)."""
        if self.adapter is None:
            write_model(folder, self.config, read, torch.float32)
        else:
            self.describe(folder)
            peft_files.write_tensors(folder, self.adapter, self.config, read)


def open_form(folder: Path) -> tuple[Form, StoredTensors]:
    """What ``write`` wrote, and its tensors, by their names inside the package; UserError where one is missing."""
    config, _ = load_config(folder)
    if not (folder / peft_files.CONFIG).is_file():
        form, stored = Form(config), open_tensors(folder)
    else:
        adapter, base = peft_files.read_config(folder)
        form = Form(config, adapter, base)
        stored = StoredTensors(safetensors_files(folder, form.stem), peft_files.from_file_name)
    stored.check(form.shapes)
    return form, stored
