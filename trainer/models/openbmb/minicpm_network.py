"""The network of MiniCPM-V 2.6 and MiniCPM-o 2.6 (Yao et al., arXiv 2408.01800): SigLIP on parts of an image at their own aspect ratio, a
perceiver resampler, Qwen2. Tower and decoder are modules of transformers; names and config are those of the published checkpoints.

The tower has the modules of transformers' Idefics2 vision transformer, but not its forward pass: that pads parts of different sizes to a common
rectangle, while here, as in the published code, each part is a sequence of patches (a wide and a tall part would need four times the memory).
From 49 patches per side on, some of its position ids also differ from those of the published code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from trainer.models.openbmb.published import initialise
from trainer.models.openbmb.resampler import Resampler

HEAD_WIDTH = 128  # of the resampler
EDGE = 1e-6  # fractions of a side are below 1 - EDGE
QUERIES = 64


class MiniCPMVConfig(Qwen2Config):
    """Flat, as published: the keys of the decoder together with vision_config, slice_config, query_num and others. Unknown keys are kept
    unchanged."""

    model_type = "minicpmv"

    def to_dict(self) -> dict[str, Any]:
        """With the keys of transformers 4, which the published code needs, and without the folder that it was read from."""
        content = {key: value for key, value in super().to_dict().items() if key != "_name_or_path"}
        return {**content, "rope_theta": self.rope_parameters["rope_theta"], "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """All keys, because the defaults of transformers 4 differ from those of this version."""
        return self.to_dict()


class MiniCPMOConfig(MiniCPMVConfig):
    """With audio_config and tts_config in addition."""

    model_type = "minicpmo"


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """`kept_tensors`: tensors of the checkpoint that this network does not use, name -> tensor on the CPU. They are not parameters, so that they are
    on no device, in no optimizer and on no other rank; they are saved again unchanged."""

    config_class = MiniCPMVConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _init_weights = initialise

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        vision = vision_config(config)
        self.llm = Qwen2ForCausalLM(config)
        self.vpm = Idefics2VisionTransformer(vision)
        self.resampler = Resampler(
            queries=getattr(config, "query_num", QUERIES),
            width=config.hidden_size,
            heads=max(1, config.hidden_size // HEAD_WIDTH),
            patch_width=vision.hidden_size,
        )
        self.kept_tensors: dict[str, Tensor] = {}
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.llm.lm_head

    def get_image_features(self, pixel_values: Tensor, target_sizes: Tensor) -> Tensor:
        """(parts, queries, width). `pixel_values`: (1, 3, patch, patches x patch), the patches of all parts side by side; `target_sizes`:
        (parts, 2) int64, rows and columns of patches of each part."""
        sizes = target_sizes.tolist()
        hidden, mask = encode_patches(self.vpm, pixel_values, sizes)
        return self.resampler(hidden, sizes, mask)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        target_sizes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """Returns the output of Qwen2ForCausalLM. Image features replace the embeddings where input_ids equal the config's image_token_id."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and target_sizes is not None:
            assert input_ids is not None
            features = self.get_image_features(pixel_values, target_sizes)
            is_image = (input_ids == self.config.image_token_id).unsqueeze(-1)
            inputs_embeds = inputs_embeds.masked_scatter(is_image, features.to(inputs_embeds.dtype))
        texts = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        return self.llm(inputs_embeds=inputs_embeds, **texts, **options)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Images are passed with the prompt only; later tokens find them in the cache. The name `kwargs` tells transformers that generate()
        accepts the arguments of forward."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            inputs |= {"pixel_values": None, "target_sizes": None}
        return inputs

    def save_pretrained(self, save_directory: Any, state_dict: dict[str, Tensor] | None = None, **options: Any) -> None:
        own = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(save_directory, state_dict={**own, **self.kept_tensors}, **options)


class MiniCPMO(MiniCPMV):
    """The vision-language path of MiniCPM-o 2.6."""

    config_class = MiniCPMOConfig


def vision_config(config: MiniCPMVConfig) -> Idefics2VisionConfig:
    """`drop_vision_last_layer` defaults to true (class MiniCPMVConfig of the published code); the configs of both 2.6 models have the key."""
    given = {key: value for key, value in config.vision_config.items() if key != "model_type"}
    given["num_hidden_layers"] -= int(getattr(config, "drop_vision_last_layer", True))
    made = Idefics2VisionConfig(**given)
    made._attn_implementation = config._attn_implementation
    return made


def encode_patches(tower: Idefics2VisionTransformer, pixel_values: Tensor, sizes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """The features of each part, (parts, most patches, width), and a mask of its patches, (parts, most patches) bool, None if all parts have
    the same number. `sizes`: rows and columns of patches."""
    embed = tower.embeddings.patch_embedding
    patches = embed(pixel_values.to(embed.weight.dtype)).flatten(2).transpose(1, 2).squeeze(0)
    positions = patch_positions(sizes, tower.embeddings.num_patches_per_side).to(patches.device)
    patches = patches + tower.embeddings.position_embedding(positions)
    counts = [rows * columns for rows, columns in sizes]
    padded = torch.nn.utils.rnn.pad_sequence(patches.split(counts), batch_first=True)
    mask = None
    if min(counts) < max(counts):
        mask = torch.arange(max(counts), device=patches.device) < torch.tensor(counts, device=patches.device)[:, None]
    seen = create_bidirectional_mask(config=tower.config, inputs_embeds=padded, attention_mask=mask)
    hidden = tower.encoder(inputs_embeds=padded, attention_mask=seen).last_hidden_state
    return tower.post_layernorm(hidden), mask


def patch_positions(sizes: Sequence[Sequence[int]], side: int) -> Tensor:
    """The index of the position embedding of each patch of each part, int64: that of the same relative position in a grid of `side` x `side`
    (fractional positions of NaViT, Dehghani et al., arXiv 2307.06304). In float32 on the CPU, as in the training of the checkpoints: for a
    fraction on an edge, the result depends on rounding."""
    edges = torch.arange(1 / side, 1.0, 1 / side)
    found = {length: torch.bucketize(fractions(length), edges, right=True) for length in {length for size in sizes for length in size}}
    return torch.cat([(found[rows][:, None] * side + found[columns]).flatten() for rows, columns in sizes])


def fractions(length: int) -> Tensor:
    """(length,) float32, from 0 to below 1."""
    return torch.arange(0, 1 - EDGE, (1 / torch.tensor(length, dtype=torch.int32)).item())
