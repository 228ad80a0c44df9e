"""OpenELM for Hugging Face transformers (4.57 and 5): the whole model in this one file.

OpenELM is a decoder-only language model whose layers are not alike: layer-wise scaling gives each its own number of
attention heads and its own feed-forward width, narrow near the input and wide near the output. Otherwise a layer is
what one would expect: RMSNorm, grouped-query attention with normalised queries and keys, RoPE, SwiGLU.

This file stands beside the weights of a model folder, and config.json points to it (``auto_map``). So the folder opens
with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

and with nothing installed but torch and transformers. It was written by the OpenELM framework (``openelm``), under the
Apache License 2.0; where that is installed, ``import openelm.interop.huggingface`` registers these classes, and
``trust_remote_code`` is not needed. The weights beside it have a licence of their own: see README.md.

No module here computes a tensor when it is made: transformers builds models without memory (on the meta device) and
then fills in what is stored, so whatever else was computed before would be lost without a word.

Shapes, named after their letters: B batch, T tokens, S keys (those in the cache too), D model_dim, H query heads,
G key/value heads, K head_dim, R half of it, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

NORM_EPS = 1e-6
# Versions of transformers differ in the arguments of this function: each is given those that it knows.
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)

# Choices that the published folders spell out, and that are not open here.
BUILT = {"ffn_with_glu": True, "activation_fn_name": "swish"}

Multipliers = float | Sequence[float]


class OpenELMConfig(PretrainedConfig):
    """The architecture, in the keys of the published OpenELM folders. The defaults are OpenELM-270M.

    ``qkv_multipliers`` (alpha) and ``ffn_multipliers`` (beta) scale the width of the queries and of the feed-forward:
    a number, a pair (first layer, last layer) that is spread evenly, or one number a layer. ``num_query_heads`` and
    ``num_kv_heads``, one number a layer, follow from alpha where they are not given. Raises ValueError for a geometry
    that is none.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a plain list)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "rope_theta": "rope_freq_constant",
        "hidden_act": "activation_fn_name",
        # One fact must not have two values: a tool that unties the embedding unties it in both words.
        "tie_word_embeddings": "share_input_output_layers",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        num_transformer_layers: int = 16,
        model_dim: int = 1280,
        head_dim: int = 64,
        qkv_multipliers: Multipliers = (0.5, 1.0),
        num_query_heads: Sequence[int] | None = None,
        num_kv_heads: Sequence[int] | None = None,
        num_gqa_groups: int = 4,
        ffn_multipliers: Multipliers = (0.5, 4.0),
        ffn_with_glu: bool = True,
        ffn_dim_divisor: int = 256,
        activation_fn_name: str = "swish",
        normalization_layer_name: str = "rms_norm",
        normalize_qk_projections: bool = True,
        share_input_output_layers: bool = True,
        rope_freq_constant: float = 10000,
        rope_max_length: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.qkv_multipliers = _plain(qkv_multipliers)
        self.num_gqa_groups = num_gqa_groups
        self.num_query_heads = list(num_query_heads or self._query_heads())
        self.num_kv_heads = list(num_kv_heads or [heads // num_gqa_groups for heads in self.num_query_heads])
        self.ffn_multipliers = _plain(ffn_multipliers)
        self.ffn_with_glu = ffn_with_glu
        self.ffn_dim_divisor = ffn_dim_divisor
        self.activation_fn_name = activation_fn_name
        self.normalization_layer_name = normalization_layer_name
        self.normalize_qk_projections = normalize_qk_projections
        self.rope_freq_constant = rope_freq_constant
        self.rope_max_length = rope_max_length
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        # Untied as soon as one of the two words says so: then there is an lm_head, which must not be passed over.
        kwargs["tie_word_embeddings"] = kwargs.pop("tie_word_embeddings", True) and share_input_output_layers
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**kwargs)

    @property
    def ffn_dims(self) -> list[int]:
        """Hidden width of each layer's feed-forward, input side first."""
        multipliers = _spread(self.ffn_multipliers, self.num_transformer_layers)
        return [_divisible(self.model_dim * beta, self.ffn_dim_divisor) for beta in multipliers]

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the widest layer: tools that plan memory by this number ask for one, not for a list."""
        return max(self.num_query_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads of the widest layer. A layer's own number stands in ``num_kv_heads``."""
        return max(self.num_kv_heads)

    def _query_heads(self) -> list[int]:
        """Heads of each layer: alpha * model_dim wide, in whole groups of heads."""
        step = self.head_dim * self.num_gqa_groups
        multipliers = _spread(self.qkv_multipliers, self.num_transformer_layers)
        return [_divisible(self.model_dim * alpha, step) // self.head_dim for alpha in multipliers]

    def _check(self) -> None:
        for name, only in BUILT.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)!r} is not built: OpenELM models have {only!r}")
        if self.normalization_layer_name not in NORMS:
            norm, known = self.normalization_layer_name, " or ".join(map(repr, NORMS))
            raise ValueError(f"normalization_layer_name={norm!r} is not built: OpenELM models have {known}")
        layers = self.num_transformer_layers
        for name in ("num_query_heads", "num_kv_heads"):
            if len(getattr(self, name)) != layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {layers} layers: give one a layer")
        for layer, (query, kv) in enumerate(zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            if kv < 1 or query % kv:
                raise ValueError(f"layer {layer}: {query} query heads cannot share {kv} key/value heads evenly")
        _spread(self.ffn_multipliers, layers)


def _plain(multipliers: Multipliers) -> float | list[float]:
    """As JSON has it."""
    return list(multipliers) if isinstance(multipliers, Sequence) else multipliers


def _spread(multipliers: float | list[float], layers: int) -> list[float]:
    """One multiplier a layer; a pair is spread evenly and rounded to two places, as in the released models."""
    if not isinstance(multipliers, list):
        return [multipliers] * layers
    if len(multipliers) == layers:
        return multipliers
    if len(multipliers) == 1:
        return multipliers * layers
    if len(multipliers) != 2:
        raise ValueError(f"{len(multipliers)} multipliers for {layers} layers: give one, a pair, or one a layer")
    first, last = multipliers
    if layers == 1:
        return [round(first, 2)]
    step = (last - first) / (layers - 1)
    return [round(first + layer * step, 2) for layer in range(layers - 1)] + [round(last, 2)]


def _divisible(width: float, divisor: int) -> int:
    """``width`` rounded to a multiple of ``divisor``: at least one, and never under 0.9 of it."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


class OpenELMRMSNorm(nn.Module):
    """Root-mean-square norm: statistics in fp32, the gain applied after the cast back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return (wide * scale).to(x.dtype) * self.weight


class OpenELMLayerNorm(OpenELMRMSNorm):
    """The same without the mean: no released model has it, one trained for comparison may."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return super().forward((wide - wide.mean(dim=-1, keepdim=True)).to(x.dtype))


NORMS = {"rms_norm": OpenELMRMSNorm, "layer_norm": OpenELMLayerNorm}


def rope_table(positions_BT: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each position, in fp32 whatever the weights are in: each (B, 1, T, R)."""
    exponents_R = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    angles_B1TR = positions_BT[:, None, :, None].float() * base**-exponents_R
    return angles_B1TR.cos(), angles_B1TR.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE on the two halves of the last dimension, computed in fp32, given in ``dtype``."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(dtype)


def eager_attention(
    module: "OpenELMAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: (B, T, H, K), and the weights (B, H, T, S). The other kinds are transformers' own."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # The smallest number, not minus infinity: a row that may look at nothing stays finite.
        scores_BHTS = scores_BHTS.masked_fill(~attention_mask, torch.finfo(scores_BHTS.dtype).min)
    elif attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = F.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights_BHTS @ value).transpose(1, 2), weights_BHTS


class OpenELMAttention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys; each layer has its own numbers of heads."""

    is_causal = True

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.query_heads, self.kv_heads = config.num_query_heads[layer_idx], config.num_kv_heads[layer_idx]
        self.num_key_value_groups = self.query_heads // self.kv_heads
        self.qkv_proj = nn.Linear(config.model_dim, (self.query_heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        norm = NORMS[config.normalization_layer_name]
        self.q_norm = norm(self.head_dim) if config.normalize_qk_projections else nn.Identity()
        self.k_norm = norm(self.head_dim) if config.normalize_qk_projections else nn.Identity()
        self.out_proj = nn.Linear(self.query_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        H, G, K = self.query_heads, self.kv_heads, self.head_dim
        qkv_BTNK = self.qkv_proj(x_BTD).unflatten(-1, (-1, K))
        q_BHTK, k_BGTK, v_BGTK = (part.transpose(1, 2) for part in qkv_BTNK.split((H, G, G), dim=2))
        q_BHTK = rotate(self.q_norm(q_BHTK), *rope, v_BGTK.dtype)
        k_BGTK = rotate(self.k_norm(k_BGTK), *rope, v_BGTK.dtype)
        if past_key_values is not None:
            where = {"cache_position": cache_position}  # for older transformers; later ones count by themselves
            k_BGTK, v_BGTK = past_key_values.update(k_BGTK, v_BGTK, self.layer_idx, where)
        # "eager" is not among them. vLLM reads the source, and wants to find a plain look-up here.
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention)
        mixed_BTHK, weights_BHTS = attend(self, q_BHTK, k_BGTK, v_BGTK, attention_mask, scaling=self.scaling, **kwargs)
        return self.out_proj(mixed_BTHK.flatten(2)), weights_BHTS


class OpenELMFeedForward(nn.Module):
    """SwiGLU: ``proj_1`` holds gate and up stacked."""

    def __init__(self, model_dim: int, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.proj_1(x_BTD).chunk(2, dim=-1)
        return self.proj_2(F.silu(gate) * up)


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """One layer, normalised before each half. Gives its output and the attention weights, if there are any."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        norm = NORMS[config.normalization_layer_name]
        self.attn_norm = norm(config.model_dim)
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn_norm = norm(config.model_dim)
        self.ffn = OpenELMFeedForward(config.model_dim, config.ffn_dims[layer_idx])

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        mixed_BTD, weights_BHTS = self.attn(self.attn_norm(x_BTD), **kwargs)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), weights_BHTS


class OpenELMPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about OpenELM models. First weights are transformers' usual ones."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "token_embeddings"
    _no_split_modules = ["OpenELMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for certain words in this file, each version for others


class OpenELMModel(OpenELMPreTrainedModel):
    """The transformer without its output layer."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMDecoderLayer(config, i) for i in range(config.num_transformer_layers))
        self.norm = NORMS[config.normalization_layer_name](config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The states that the output layer reads, (B, T, D), and the cache.

        ``attention_mask`` is (B, S), boolean or 0 and 1, False for padding on either side; or (B, 1, T, S), as it is to
        be. Without ``position_ids``, positions count what is no padding, so that padding on the left changes nothing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x_BTD = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        with_attentions = self._wanted(output_attentions, "output_attentions")
        with_states = self._wanted(output_hidden_states, "output_hidden_states")
        if with_attentions and self.config._attn_implementation != "eager":
            kind = self.config._attn_implementation
            raise ValueError(f"{kind} attention keeps no weights to give: load with attn_implementation='eager'")
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a layer that is computed twice would fill it twice
        if self._wanted(use_cache, "use_cache") and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        columns_T = kwargs.pop("cache_position", None)
        if columns_T is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            columns_T = torch.arange(x_BTD.shape[1], device=x_BTD.device) + past
        if position_ids is None:
            position_ids = self._positions(columns_T, attention_mask)
        mask = self._mask(x_BTD, attention_mask, columns_T, past_key_values, position_ids)
        rope = rope_table(position_ids, self.config.head_dim, self.config.rope_freq_constant)

        states: list[Tensor] = []
        attentions: list[Tensor] = []
        for layer in self.layers:
            if with_states:
                states.append(x_BTD)
            x_BTD, weights_BHTS = layer(
                x_BTD,
                rope=rope,
                attention_mask=mask,
                past_key_values=past_key_values,
                cache_position=columns_T,
                position_ids=position_ids,
                **kwargs,
            )
            if with_attentions:
                attentions.append(weights_BHTS)
        x_BTD = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BTD) if with_states else None,
            attentions=tuple(attentions) if with_attentions else None,
        )

    def _wanted(self, given: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if given is None else given)

    def _mask(
        self,
        x_BTD: Tensor,
        attention_mask: Any,
        columns_T: Tensor,
        past_key_values: Cache | None,
        position_ids: Tensor,
    ) -> Any:
        """What each token may look at, in the form that this kind of attention reads; None for all before it."""
        given = {
            "config": self.config,
            "inputs_embeds": x_BTD,
            "input_embeds": x_BTD,  # as it was called before
            "attention_mask": attention_mask,
            "cache_position": columns_T,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        return create_causal_mask(**{name: value for name, value in given.items() if name in MASK_ARGUMENTS})

    def _positions(self, columns_T: Tensor, attention_mask: Any) -> Tensor:
        """Position of each token, (B, T) or (1, T): the columns, or where padding is marked, what is none before it."""
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return columns_T[None]
        counted_BS = attention_mask.long().cumsum(dim=-1) - 1
        return counted_BS.clamp(min=0)[:, -len(columns_T) :].to(columns_T.device)


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """OpenELM with its output layer, which is the embedding itself where the configuration says that it is shared."""

    # transformers 5 reads which tensor is tied to which; 4 reads the keys, as the list that it expects.
    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """A cache takes each layer's number of heads from its first keys: there is no one number to say before."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the last ``logits_to_keep`` tokens (0: of all; a tensor: of these), and the cache.

        ``labels`` (B, T) are the tokens themselves, -100 where none counts: the loss is the mean cross-entropy of each
        with what is predicted before it.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


# With this, save_pretrained writes this file beside the weights, and the folder opens wherever it is taken.
OpenELMConfig.register_for_auto_class()
OpenELMModel.register_for_auto_class("AutoModel")
OpenELMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
