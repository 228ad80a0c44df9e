"""OpenVINO: a model folder's weights in a graph that keeps its keys and values, and 8 or 4 bits by its compressor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPSILON = 1e-6


def imports() -> None:
    """What loading needs."""
    import openvino  # noqa: F401
    import torch  # noqa: F401


def load(specification: dict[str, Any]) -> OpenVino:
    """Open ``folder``, to compute in ``dtype``; ``weights`` is bf16, 8bit or 4bit (in groups of ``group_size``)."""
    return OpenVino(specification)


class OpenVino:
    """One request, whose state is emptied before each run."""

    def __init__(self, specification: dict[str, Any]) -> None:
        import openvino as ov

        model = graph(Path(specification["folder"]))
        if specification["weights"] != "bf16":
            import nncf

            four = specification["weights"] == "4bit"
            mode = nncf.CompressWeightsMode.INT4_SYM if four else nncf.CompressWeightsMode.INT8_SYM
            groups = {"group_size": specification["group_size"], "all_layers": True} if four else {}
            model = nncf.compress_weights(model, mode=mode, **groups)
        precision = "bf16" if specification["dtype"] == "bfloat16" else "f32"
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": specification["threads"]}
        settings |= {"INFERENCE_PRECISION_HINT": precision}
        self._request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        # What is fp32 in the graph is kept in the precision that it computes in.
        widest = 16 if precision == "bf16" else 32
        bits = sum(
            math.prod(op.get_output_shape(0)) * min(widest, op.get_output_element_type(0).bitwidth) for op in constants
        )
        self.about = {
            "engine": "OpenVINO",
            "bytes_per_token": bits // 8,
            "device": "cpu",
            "threads": specification["threads"],
            "software": f"openvino {ov.__version__.split('-')[0]}",
        }

    def prepare(self, batch: int, room: int) -> None:
        """No keys and values."""
        if batch != 1:
            raise ValueError("one prompt at a time is measured with this peer")
        self._request.reset_state()

    def run(self, prompts: list[list[int]], tokens: int, first: Callable[[], None]) -> list[list[int]]:
        """As child.py asks for it; the graph itself finds the likeliest token."""
        import numpy as np

        def step(ids: list[int]) -> int:
            self._request.infer({"ids": np.array([ids], dtype=np.int64), "rows": np.zeros(1, dtype=np.int32)})
            return int(self._request.get_output_tensor(0).data[0])

        made = [step(prompts[0])]
        first()
        while len(made) < tokens:
            made.append(step(made[-1:]))
        return [made]


def graph(folder: Path) -> Any:
    """The model as OpenVINO's, with its keys and values as state."""
    import numpy as np
    import openvino as ov
    import torch
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    step, layers, width = make_step(folder, config), config["num_transformer_layers"], config["head_dim"]
    past = [torch.zeros(1, heads, 3, width) for heads in config["num_kv_heads"] for _ in range(2)]
    example = (torch.ones(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), *past)
    shapes = [[1, -1], [1], *([1, part.shape[1], -1, width] for part in past)]
    with torch.no_grad():
        model = ov.convert_model(step, example_input=example, input=[ov.PartialShape(shape) for shape in shapes])
    names = ["ids", "rows", *(f"past.{part}" for part in range(2 * layers))]
    for place, name in zip(model.inputs, names, strict=True):
        place.get_tensor().set_names({name})
    for place, name in zip(model.outputs[1:], names[2:], strict=True):
        place.get_tensor().set_names({name.replace("past", "present")})
    apply_make_stateful_transformation(model, {name: name.replace("past", "present") for name in names[2:]})
    for state in (op for op in model.get_ops() if op.get_type_name() == "ReadValue"):
        heads = state.get_output_partial_shape(0)[1].get_length()
        state.set_arguments([opset13.broadcast(np.float32(0), [1, heads, 0, width]).output(0)])
    model.validate_nodes_and_infer_types()
    return model


def make_step(folder: Path, config: dict[str, Any]) -> Any:
    """A module of the likeliest next token: (ids, rows, keys and values of each layer) -> (token, the same, longer).

    ``rows`` picks the rows of the cache, which are one; it is there as OpenVINO looks for such a cache to fuse.
    """
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
    width = config["head_dim"]
    inverse = config["rope_freq_constant"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)

    def norm(x: Any, name: str) -> Any:
        gain = weights[f"transformer.{name}.weight"]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * gain

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, weights[f"transformer.{name}.weight"])

    class Step(torch.nn.Module):
        def forward(self, ids: Any, rows: Any, *past: Any) -> Any:
            before = past[0].shape[2]
            positions = torch.arange(ids.shape[1]) + before
            angles = positions[:, None] * torch.cat((inverse, inverse))
            cos, sin = angles.cos(), angles.sin()
            seen = torch.arange(ids.shape[1] + before)[None] <= positions[:, None]
            mask = torch.where(seen, 0.0, -10000.0)[None, None]

            def rotate(x: Any) -> Any:
                left, right = x.chunk(2, dim=-1)
                return x * cos + torch.cat((-right, left), dim=-1) * sin

            x = F.embedding(ids, weights["transformer.token_embeddings.weight"])
            present = []
            for layer, (queries, keys) in enumerate(
                zip(config["num_query_heads"], config["num_kv_heads"], strict=True)
            ):
                name = f"layers.{layer}"
                heads = linear(norm(x, f"{name}.attn_norm"), f"{name}.attn.qkv_proj").unflatten(-1, (-1, width))
                q, k, v = (part.transpose(1, 2) for part in heads.split((queries, keys, keys), dim=2))
                if config["normalize_qk_projections"]:
                    q, k = norm(q, f"{name}.attn.q_norm"), norm(k, f"{name}.attn.k_norm")
                k = torch.cat((past[2 * layer].index_select(0, rows), rotate(k)), dim=2)
                v = torch.cat((past[2 * layer + 1].index_select(0, rows), v), dim=2)
                present += [k, v]
                times = queries // keys
                k, v = (part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in (k, v))
                out = F.scaled_dot_product_attention(rotate(q), k, v, attn_mask=mask)
                x = x + linear(out.transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
                gate, up = linear(norm(x, f"{name}.ffn_norm"), f"{name}.ffn.proj_1").chunk(2, dim=-1)
                x = x + linear(F.silu(gate) * up, f"{name}.ffn.proj_2")
            table = weights.get("lm_head.weight", weights["transformer.token_embeddings.weight"])
            return F.linear(norm(x[:, -1], "norm"), table).argmax(-1), *present

    return Step().eval()
