"""OmniLMM-3B, which is MiniCPM-V 1.0: SigLIP so400m without its last block, a resampler of 64 queries, MiniCPM-2.4B (Hu et al., arXiv
2404.06395). A module of our own over transformers' Granite, with the parameters' published names.

MiniCPM scales embeddings, residuals and logits as Granite does (section 3 of its paper, muP). Embeddings and logits are scaled here, not by
Granite: what a resampler makes of an image is not scaled, and the loss in chunks (trainer.kernels.cross_entropy) takes the head's input as it comes.
"""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, GraniteConfig, GraniteForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from trainer.contract import InputRefused, ModelSpec
from trainer.models.architecture import ATTENTION, find_text
from trainer.models.family import UNBOUND, Family, Limit, Processor
from trainer.models.openbmb.omnilmm import HEAD_WIDTH, begins, read_shape, split_tower
from trainer.models.openbmb.published import (
    assemble,
    find_frame,
    find_marks,
    has_tokenizer,
    initialise,
    keep_marks,
    load_published,
    open_published,
    put_images,
    read_config,
)
from trainer.models.openbmb.query_resampler import QueryResampler
from trainer.models.openbmb.tower import Tower
from trainer.models.processor import find_ids
from trainer.models.span import Fixed
from trainer.models.tiny import tiny_tokenizer

TOKENS = {"image_start_token": "<image>", "image_end_token": "</image>"}
UNKNOWN = "<unk>"  # stands for each query; never seen by the decoder
# timm's vit_so400m_patch14_siglip_384. The published config names the tower and no number of it.
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "positions": 27,
}  # fmt: skip
MEAN = STD = (0.5, 0.5, 0.5)
SCALES = ("scale_emb", "scale_depth", "dim_model_base")  # options of the decoder


class MiniCPMVConfig(GraniteConfig):
    """The published fields; `tower` and the three ids, which a published file lacks, are written by us. A published `tower` has 27 layers
    and a last one that is dropped; one of ours has those that are there."""

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
    """Images come as `pixel_values`, (images, 3, side, side), in the order of their places in `input_ids`."""

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
        """`inputs_embeds`: scaled, as the decoder takes them."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids) * self.config.scale_emb
            if pixel_values is not None and begins(past_key_values):
                features = self.get_image_features(pixel_values.to(inputs_embeds.dtype))
                inputs_embeds = put_images(inputs_embeds, input_ids, features.pooler_output, find_marks(self.config))
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
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=seen.past_key_values)


def make_granite(config: MiniCPMVConfig) -> GraniteConfig:
    """MiniCPM's decoder as Granite's, without the two scales that are taken here (MiniCPM, section 3.2 and table 7)."""
    granite = copy.deepcopy(config)
    granite.embedding_multiplier = 1.0
    granite.logits_scaling = 1.0
    granite.residual_multiplier = config.scale_depth / config.num_hidden_layers**0.5
    granite.attention_multiplier = (config.hidden_size // config.num_attention_heads) ** -0.5
    return granite


def find_tower(config: MiniCPMVConfig) -> dict[str, Any]:
    return config.tower or {**SIGLIP, "num_hidden_layers": SIGLIP["num_hidden_layers"] - config.drop_vision_last_layer}


def split_config(config: MiniCPMVConfig) -> SimpleNamespace:
    tower = SimpleNamespace(**{**find_tower(config), "image_size": config.image_size})
    return SimpleNamespace(text_config=config, vision_config=tower)


def create(model: ModelSpec) -> MiniCPMV:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    tokenizer = start_tokenizer(model)
    before, after = find_ids(tokenizer, TOKENS, "image_start_token", "image_end_token")
    tower, side = split_tower(model)
    queries = {"query_num": model.architecture["options"]["num_query"], "image_size": side}
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    ids = {"image_start_token_id": before, "image_token_id": unknown, "image_end_token_id": after}
    config = MiniCPMVConfig(**{**find_text(model, tokenizer), **queries, **ids}, tower=tower)
    config._attn_implementation = ATTENTION[model.attention]
    return MiniCPMV(config)


def start_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    tokenizer.add_special_tokens({"unk_token": UNKNOWN})
    return tokenizer


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model or revision."""
    config = read_first(folder, model)
    if None in find_marks(config) or has_tokenizer(folder):  # weights of ours are whole without one
        keep_marks(config, find_frame(folder, model, config, TOKENS, UNKNOWN))
    return load_published(MiniCPMV, config, folder, model, dtype, on_meta=on_meta)


def read_first(folder: Path, model: ModelSpec) -> MiniCPMVConfig:
    """The config of a MiniCPM-V 1.0. Raises InputRefused for later ones too, which have the same model type: they cut an image into slices."""
    given = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    if given.get("model_type") == "minicpmv" and (given.get("slice_mode") or "vision_config" in given):
        raise InputRefused(
            f"{folder} is a MiniCPM-V 2 or later, which cuts images into slices; {model.name} is MiniCPM-V 1.0: choose the checkpoint's "
            "own with model=NAME."
        )
    config: MiniCPMVConfig = read_config(folder, model, MiniCPMVConfig, split_config)
    return config


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    return complete(model, start_tokenizer(model), model.architecture["options"]["num_query"], split_tower(model)[1])


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = read_first(folder, model)
    find_frame(folder, model, config, TOKENS, UNKNOWN)
    return complete(model, open_published(folder, model, config.vocab_size, TOKENS), config.query_num, config.image_size)


def complete(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, queries: int, side: int) -> Processor:
    before, after = find_ids(tokenizer, TOKENS, "image_start_token", "image_end_token")
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    return assemble(model, tokenizer, Fixed(before=(before,), image=unknown, after=(after,), tokens=queries), side, mean=MEAN, std=STD)


def unused(model: torch.nn.Module) -> frozenset[str]:
    """Every block that is there leads to the resampler."""
    return frozenset()


OMNILMM_3B = Family(
    name="omnilmm_3b",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
