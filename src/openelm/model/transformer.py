"""The OpenELM transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU; every layer with its own widths.

Shapes: B batch, T tokens, D model_dim, H query heads, G key/value heads, K head_dim, F FFN width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openelm.model.cache import Cache
from openelm.model.functional import layer_norm, rms_norm, rotate, swiglu
from openelm.model.geometry import ModelConfig
from openelm.model.loss import fused_cross_entropy, target_log_probs

Checkpointing = Literal["none", "selective", "full"]


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in fp32, the gain applied after the cast back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class LayerNorm(RMSNorm):
    """The same without the mean: for comparison, with as many parameters under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight)


NORMS: dict[str, type[RMSNorm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}  # as a geometry names them


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines in fp32 for ``positions`` (any shape): each (*positions.shape, head_dim / 2)."""
    inverse = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[..., None].float() * inverse
    return angles.cos(), angles.sin()


def attend(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Tensor | None, *, causal: bool, repeat: bool
) -> Tensor:
    """Attention of H query heads to G key/value heads; ``repeat`` writes the latter down H times, with the same result.

    On CUDA, groups together with a mask are left to a kernel that keeps all scores; alike heads go to the fused one.
    """
    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    if T == 1 and H != G:
        # The heads of a group are the rows of one small product: its keys and values are read once.
        q_BGTK = q_BHTK.reshape(B, G, H // G, K)
        return F.scaled_dot_product_attention(q_BGTK, k_BGTK, v_BGTK, attn_mask=mask).view(B, H, 1, K)
    if repeat and H != G:
        k_BGTK, v_BGTK = (x_BGTK.repeat_interleave(H // G, dim=1) for x_BGTK in (k_BGTK, v_BGTK))
    grouped = k_BGTK.shape[1] != H
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    """Causal grouped-query attention; queries and keys are normalised by ``qk_norm``, where there is one."""

    def __init__(
        self, model_dim: int, query_heads: int, kv_heads: int, head_dim: int, qk_norm: type[RMSNorm] | None
    ) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, head_dim
        self.qkv_proj = nn.Linear(model_dim, (query_heads + 2 * kv_heads) * head_dim, bias=False)
        self.q_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.out_proj = nn.Linear(query_heads * head_dim, model_dim, bias=False)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], layer: int, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        H, G, K = self.query_heads, self.kv_heads, self.head_dim
        qkv_BTNK = self.qkv_proj(x_BTD).unflatten(-1, (-1, K))
        q_BHTK, k_BGTK, v_BGTK = (part.transpose(1, 2) for part in qkv_BTNK.split((H, G, G), dim=2))
        q_BHTK = rotate(self.q_norm(q_BHTK), *rope)
        k_BGTK = rotate(self.k_norm(k_BGTK), *rope)
        # Only a first token row sees a square: later ones need the mask that the caller made.
        causal = mask is None and q_BHTK.shape[2] > 1
        if cache is not None:
            k_BGTK, v_BGTK = cache.append(layer, k_BGTK, v_BGTK)
        out_BHTK = attend(q_BHTK, k_BGTK, v_BGTK, mask, causal=causal, repeat=mask is not None and x_BTD.is_cuda)
        return self.out_proj(out_BHTK.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: ``proj_1`` holds gate and up stacked."""

    def __init__(self, model_dim: int, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj_2(swiglu(self.proj_1(x_BTD)))


class Block(nn.Module):
    """One layer, normalised before each half."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = NORMS[config.normalization_layer_name]
        self.layer = layer
        self.checkpointing: Checkpointing = "none"
        self.attn_norm = norm(config.model_dim)
        self.attn = Attention(
            config.model_dim,
            config.num_query_heads[layer],
            config.num_kv_heads[layer],
            config.head_dim,
            norm if config.normalize_qk_projections else None,
        )
        self.ffn_norm = norm(config.model_dim)
        self.ffn = FeedForward(config.model_dim, config.ffn_dims[layer])

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        if self.checkpointing == "full" and self.training:
            return checkpoint(self._both_halves, x_BTD, rope, mask, cache, use_reentrant=False)
        return self._both_halves(x_BTD, rope, mask, cache)

    def _both_halves(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rope, self.layer, mask, cache)
        if self.checkpointing == "selective" and self.training:
            return x_BTD + checkpoint(self._feed_forward, x_BTD, use_reentrant=False)
        return x_BTD + self._feed_forward(x_BTD)

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        return self.ffn(self.ffn_norm(x_BTD))


class OpenELM(nn.Module):
    """A decoder-only language model with layer-wise scaling; parameter names are CoreNet's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_transformer_layers))
        self.norm = NORMS[config.normalization_layer_name](config.model_dim)
        if not config.share_input_output_layers:
            self.classifier = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        # Does to another blank model what has been done to this one since (adapters built in), for those who make one
        # to hold the same weights.
        self.adapt: Callable[[OpenELM], None] | None = None

    def checkpoint_activations(self, which: Checkpointing) -> None:
        """What the backward pass computes again instead of keeping: nothing, the FFNs (which are most), or all."""
        for block in self.layers:
            block.checkpointing = which  # type: ignore[assignment]

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix of the output layer: the embedding itself where it is shared."""
        if self.config.share_input_output_layers:
            return self.token_embeddings.weight
        return self.classifier.weight

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        segments_BT: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The (B, T, D) states that the output layer reads.

        ``segments_BT`` keeps attention within runs of equal numbers. ``positions`` (T or B, T) and ``mask``
        (broadcast to B, 1, T, all keys; True attends) replace the usual 0, 1, 2, … and the causal square; with a
        ``cache`` both follow its length, and the caller adds T to ``cache.length`` afterwards.
        """
        T, past = tokens_BT.shape[1], cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens_BT.device)
        if mask is None and segments_BT is not None:
            same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
            mask = same_BTT.tril()[:, None]
        elif mask is None and past and T > 1:
            keys = torch.arange(past + T, device=tokens_BT.device)
            mask = keys <= positions[..., None]
            mask = mask[:, None] if mask.dim() == 3 else mask
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_freq_constant)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        x_BTD = self.token_embeddings(tokens_BT)
        for block in self.layers:
            x_BTD = block(x_BTD, (cos, sin), mask, cache)
        return self.norm(x_BTD)

    @overload
    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        *,
        z_loss_weight: float,
        counted: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        log_probs: bool = False,
        counted: int | None = None,
    ) -> Tensor: ...

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        z_loss_weight: float | None = None,
        log_probs: bool = False,
        counted: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V); with ``targets`` (B, T; -100 is ignored) the summed cross-entropy in nats.

        With ``z_loss_weight`` too, the pair (cross-entropy + weighted z-loss, the z-loss in it), summed over valid
        targets; with ``log_probs`` instead, each target's log-probability (B, T) in fp32, 0 where it is ignored. All
        are computed here, chunk by chunk, so that all logits never exist at once. ``counted`` is how many targets are
        valid, where the caller knows it and they are few: no others' logits are made then.
        """
        x_BTD = self.hidden(tokens, segments_BT=segments)
        if targets is None:
            assert not log_probs, "log-probabilities of which targets?"
            return F.linear(x_BTD, self.output_weight)
        if log_probs:
            log_p_N = target_log_probs(x_BTD.flatten(0, 1), self.output_weight, targets.flatten(), counted)
            return log_p_N.view_as(targets)
        total, z_loss = fused_cross_entropy(
            x_BTD.flatten(0, 1), self.output_weight, targets.flatten(), z_loss_weight or 0.0, counted
        )
        return total if z_loss_weight is None else (total, z_loss)


def initial_weights(model: OpenELM, seed: int) -> Iterator[tuple[str, Tensor]]:
    """First weights of ``model`` by name, whole, fp32, on the CPU: the same on every device and every rank.

    As CoreNet's: normal, by fan-in; what writes to the residual stream smaller by depth. Each tensor has a generator of
    its own, seeded by its place: the same values whatever else is drawn.
    """
    config = model.config
    depth = (2 * config.num_transformer_layers) ** -0.5
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape)
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            std = config.model_dim**-0.5 * depth
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        yield name, torch.empty(parameter.shape).normal_(std=std, generator=generator)


@torch.no_grad()
def init_weights(model: OpenELM, seed: int) -> None:
    """Fill ``model`` in place with its first weights."""
    parameters = dict(model.named_parameters())
    for name, values in initial_weights(model, seed):
        parameters[name].copy_(values)
