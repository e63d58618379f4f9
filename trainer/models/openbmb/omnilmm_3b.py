"""OmniLMM-3B, which is MiniCPM-V 1.0: SigLIP so400m without its last block, a resampler of 64 queries, MiniCPM-2.4B (Hu et al., arXiv
2404.06395). Our own module on top of transformers' Granite, with the published parameter names.

MiniCPM scales embeddings, residuals and logits as Granite does (section 3 of its paper, muP). Embeddings and logits are scaled here and not in
Granite: the features of images must not be scaled, and the chunked loss (trainer.kernels.cross_entropy) needs the scaled input of the head.
"""

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, GraniteConfig, GraniteForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from trainer.contract import InputRefused, ModelSpec
from trainer.models.openbmb.omnilmm_family import HEAD_WIDTH, OmniLMMEdition, embed_images, make_family, make_output
from trainer.models.openbmb.published import initialise
from trainer.models.openbmb.query_resampler import QueryResampler
from trainer.models.openbmb.tower import Tower, read_shape
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {"image_start_token": "<image>", "image_end_token": "</image>"}
UNKNOWN = "<unk>"  # stands for each query; its embedding is replaced by image features
# timm's vit_so400m_patch14_siglip_384. The published config has the name of the tower, but no numbers.
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "positions": 27,
}  # fmt: skip
MEAN = STD = (0.5, 0.5, 0.5)


class MiniCPMVConfig(GraniteConfig):
    """The published fields, and those that only our own checkpoints have: `tower` and the three ids. The published tower has 27 layers, of
    which the last is dropped; our `tower` has only the layers that are used."""

    model_type = "minicpmv"

    scale_emb: float | int = 1
    scale_depth: float | int = 1
    dim_model_base: int = 1
    vision_encoder: str = "vit_so400m_patch14_siglip_384.webli"
    query_num: int = 64
    image_size: int = 448
    drop_vision_last_layer: bool = True
    tower: dict[str, Any] | None = None
    image_start_token_id: int | None = None
    image_token_id: int | None = None
    image_end_token_id: int | None = None


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """`pixel_values`: (images, 3, side, side), in the order of the images in `input_ids`."""

    config_class = MiniCPMVConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar = ["GraniteDecoderLayer", "Block", "QueryResampler"]
    _init_weights = initialise

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        sizes = find_tower(config)
        self.llm = GraniteForCausalLM(make_granite(config))
        self.vpm = Tower(read_shape(sizes, eva=False))
        heads = max(1, config.hidden_size // HEAD_WIDTH)
        self.resampler = QueryResampler(width=config.hidden_size, source=sizes["hidden_size"], queries=config.query_num, heads=heads)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.llm.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.llm.lm_head

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """(images, 3, side, side) -> `pooler_output` (images, queries, width)."""
        return BaseModelOutputWithPooling(pooler_output=self.resampler(self.vpm(pixel_values)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`inputs_embeds`: already scaled."""
        if inputs_embeds is None:
            scaled = self.get_input_embeddings()(input_ids) * self.config.scale_emb
            inputs_embeds = embed_images(self, scaled, input_ids, pixel_values, past_key_values)
        seen = self.llm.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        scale = self.config.hidden_size / self.config.dim_model_base
        logits = self.llm.lm_head(slice_logits_to_keep(seen.last_hidden_state, logits_to_keep) / scale)
        return make_output(self, logits, labels, seen.past_key_values, **kwargs)


def make_granite(config: MiniCPMVConfig) -> GraniteConfig:
    """MiniCPM's decoder as a Granite, without the two scales that are applied here (MiniCPM, section 3.2 and table 7)."""
    granite = copy.deepcopy(config)
    granite.embedding_multiplier = 1.0
    granite.logits_scaling = 1.0
    granite.residual_multiplier = config.scale_depth / config.num_hidden_layers**0.5
    granite.attention_multiplier = (config.hidden_size // config.num_attention_heads) ** -0.5
    return granite


def find_tower(config: MiniCPMVConfig) -> dict[str, Any]:
    return config.tower or {**SIGLIP, "num_hidden_layers": SIGLIP["num_hidden_layers"] - config.drop_vision_last_layer}


def make_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    tokenizer.add_special_tokens({"unk_token": UNKNOWN})
    return tokenizer


def refuse_later(folder: Path, model: ModelSpec) -> None:
    """Raises InputRefused for a later MiniCPM-V, which has the same model type but divides images into slices."""
    given = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    if given.get("model_type") == "minicpmv" and (given.get("slice_mode") or "vision_config" in given):
        raise InputRefused(
            f"{folder} is a MiniCPM-V 2 or later, which divides images into slices; {model.name} is MiniCPM-V 1.0\n"
            "    set model=NAME to the checkpoint's model"
        )


OMNILMM_3B = make_family(
    OmniLMMEdition(
        name="omnilmm_3b",
        network=MiniCPMV,
        config=MiniCPMVConfig,
        tokens=TOKENS,
        image_token=UNKNOWN,
        queries="query_num",
        find_tower=find_tower,
        make_tokenizer=make_tokenizer,
        check=refuse_later,
        mean=MEAN,
        std=STD,
    )
)
