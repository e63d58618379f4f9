"""OmniLMM-12B: EVA-02-CLIP enormous without its last block, a resampler, Zephyr 7B beta, which is a Mistral (OpenBMB/MiniCPM-V,
docs/omnilmm_en.md). A module of our own over transformers' Mistral, with the parameters' published names."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, MistralConfig, MistralModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.models.architecture import ATTENTION, find_sizes, find_text
from trainer.models.family import UNBOUND, Family, Limit, Processor
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
from trainer.models.openbmb.tower import Tower, TowerShape
from trainer.models.processor import find_ids
from trainer.models.span import Fixed
from trainer.models.tiny import tiny_tokenizer

TOKENS = {"image_patch_token": "<im_patch>", "image_start_token": "<im_start>", "image_end_token": "<im_end>"}
# timm's eva02_enormous_patch14_clip_224, of whose 64 blocks the published model uses 63. Its config names the tower and no number of it.
EVA = {
    "hidden_size": 1792, "intermediate_size": 15360, "num_hidden_layers": 63, "num_attention_heads": 16, "patch_size": 14, "positions": 16,
}  # fmt: skip
HEAD_WIDTH = 128  # of the resampler
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's (Radford et al., arXiv 2103.00020)


class OmniLMMConfig(MistralConfig):
    """The published fields; `tower` and the three ids, which a published file lacks, are written by us."""

    model_type = "omnilmm"

    mm_vision_tower: str = "eva02_enormous_patch14_clip_224.laion2b_plus"
    num_query: int = 64
    image_size: int = 448
    mm_use_im_start_end: bool = True
    tower: dict[str, Any] | None = None
    image_start_token_id: int | None = None
    image_token_id: int | None = None
    image_end_token_id: int | None = None


class OmniLMMModel(MistralModel):
    """Mistral with tower and resampler beside its layers. A class of its own since transformers starts what lies in a model by the rules of
    that model alone: in a plain Mistral their bare tensors would stay zero."""

    _init_weights = initialise

    def __init__(self, config: OmniLMMConfig) -> None:
        text = copy.deepcopy(config)
        text.sliding_window = None  # Mistral's 4,096 tokens are more than the tokenizer's 2,048: no layer ever forgets a token
        super().__init__(text)
        sizes = config.tower or EVA
        self.vision_tower = Tower(read_shape(sizes, eva=True))
        heads = max(1, config.hidden_size // HEAD_WIDTH)
        self.resampler = QueryResampler(width=config.hidden_size, source=sizes["hidden_size"], queries=config.num_query, heads=heads)
        self.post_init()


class OmniLMMForCausalLM(PreTrainedModel, GenerationMixin):
    """Images come as `pixel_values`, (images, 3, side, side), in the order of their places in `input_ids`."""

    config_class = OmniLMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar = ["MistralDecoderLayer", "Block", "QueryResampler"]
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _init_weights = initialise

    def __init__(self, config: OmniLMMConfig) -> None:
        super().__init__(config)
        self.model = OmniLMMModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """(images, 3, side, side) -> `pooler_output` (images, queries, width)."""
        return BaseModelOutputWithPooling(pooler_output=self.model.resampler(self.model.vision_tower(pixel_values)))

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
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
            if pixel_values is not None and begins(past_key_values):
                features = self.get_image_features(pixel_values.to(inputs_embeds.dtype))
                inputs_embeds = put_images(inputs_embeds, input_ids, features.pooler_output, find_marks(self.config))
        seen = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(seen.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=seen.past_key_values)


def read_shape(sizes: dict[str, Any], *, eva: bool) -> TowerShape:
    """`sizes`: by the names of conf/model."""
    return TowerShape(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        patch_size=sizes["patch_size"],
        positions=sizes["positions"],
        eva=eva,
    )


def begins(past_key_values: Any) -> bool:
    """Whether nothing was read yet: an image is read with the prompt, and not again with each token of the answer."""
    return past_key_values is None or past_key_values.get_seq_length() == 0


def split_tower(model: ModelSpec) -> tuple[dict[str, Any], int]:
    """The tower's numbers of conf/model, and the side of an image in pixels."""
    sizes = find_sizes(model, "vision")
    return {key: value for key, value in sizes.items() if key != "image_size"}, sizes["image_size"]


def split_config(config: OmniLMMConfig) -> SimpleNamespace:
    tower = SimpleNamespace(**{**(config.tower or EVA), "image_size": config.image_size})
    return SimpleNamespace(text_config=config, vision_config=tower)


def create(model: ModelSpec) -> OmniLMMForCausalLM:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    before, image, after = find_ids(tokenizer, TOKENS, "image_start_token", "image_patch_token", "image_end_token")
    tower, side = split_tower(model)
    queries = {"num_query": model.architecture["options"]["num_query"], "image_size": side}
    ids = {"image_start_token_id": before, "image_token_id": image, "image_end_token_id": after}
    config = OmniLMMConfig(**{**find_text(model, tokenizer), **queries, **ids}, tower=tower)
    config._attn_implementation = ATTENTION[model.attention]
    return OmniLMMForCausalLM(config)


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model or revision."""
    config = read_config(folder, model, OmniLMMConfig, split_config)
    if None in find_marks(config) or has_tokenizer(folder):  # weights of ours are whole without one
        keep_marks(config, find_frame(folder, model, config, TOKENS, TOKENS["image_patch_token"]))
    return load_published(OmniLMMForCausalLM, config, folder, model, dtype, on_meta=on_meta)


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    return complete(model, tokenizer, model.architecture["options"]["num_query"], split_tower(model)[1])


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = read_config(folder, model, OmniLMMConfig, split_config)
    find_frame(folder, model, config, TOKENS, TOKENS["image_patch_token"])
    return complete(model, open_published(folder, model, config.vocab_size, TOKENS), config.num_query, config.image_size)


def complete(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, queries: int, side: int) -> Processor:
    before, after = find_ids(tokenizer, TOKENS, "image_start_token", "image_end_token")
    span = Fixed(before=(before,), image=image_id(tokenizer, TOKENS["image_patch_token"]), after=(after,), tokens=queries)
    return assemble(model, tokenizer, span, side, mean=MEAN, std=STD)


def unused(model: torch.nn.Module) -> frozenset[str]:
    """Every block leads to the resampler. The class token's place is told by attention to the others alone."""
    return frozenset()


OMNILMM = Family(
    name="omnilmm",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
