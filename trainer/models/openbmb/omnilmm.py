"""OmniLMM-12B: EVA-02-CLIP enormous without its last block, a resampler, and Zephyr 7B beta, which is a Mistral (OpenBMB/MiniCPM-V,
docs/omnilmm_en.md). Our own module on top of transformers' Mistral, with the published parameter names."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, MistralConfig, MistralModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from trainer.models.openbmb.omnilmm_family import HEAD_WIDTH, OmniLMMEdition, embed_images, make_family, make_output
from trainer.models.openbmb.published import initialise
from trainer.models.openbmb.query_resampler import QueryResampler
from trainer.models.openbmb.tower import Tower, read_shape
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {"image_patch_token": "<im_patch>", "image_start_token": "<im_start>", "image_end_token": "<im_end>"}
# timm's eva02_enormous_patch14_clip_224; the published model uses 63 of its 64 blocks. The config has the name of the tower, but no numbers.
EVA = {
    "hidden_size": 1792, "intermediate_size": 15360, "num_hidden_layers": 63, "num_attention_heads": 16, "patch_size": 14, "positions": 16,
}  # fmt: skip
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's (Radford et al., arXiv 2103.00020)


class OmniLMMConfig(MistralConfig):
    """The published fields, and those that only our own checkpoints have: `tower` and the three ids."""

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
    """Mistral with tower and resampler. A class of its own, because transformers initializes the modules of a model by the rules of the
    model: in a plain MistralModel the bare tensors of tower and resampler would stay zero."""

    _init_weights = initialise

    def __init__(self, config: OmniLMMConfig) -> None:
        text = copy.deepcopy(config)
        text.sliding_window = None  # Mistral's window of 4,096 tokens is larger than the tokenizer's maximum of 2,048
        super().__init__(text)
        sizes = config.tower or EVA
        self.vision_tower = Tower(read_shape(sizes, eva=True))
        heads = max(1, config.hidden_size // HEAD_WIDTH)
        self.resampler = QueryResampler(width=config.hidden_size, source=sizes["hidden_size"], queries=config.num_query, heads=heads)
        self.post_init()


class OmniLMMForCausalLM(PreTrainedModel, GenerationMixin):
    """`pixel_values`: (images, 3, side, side), in the order of the images in `input_ids`."""

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
            inputs_embeds = embed_images(self, self.model.embed_tokens(input_ids), input_ids, pixel_values, past_key_values)
        seen = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(seen.last_hidden_state, logits_to_keep))
        return make_output(self, logits, labels, seen.past_key_values, **kwargs)


OMNILMM = make_family(
    OmniLMMEdition(
        name="omnilmm",
        network=OmniLMMForCausalLM,
        config=OmniLMMConfig,
        tokens=TOKENS,
        image_token=TOKENS["image_patch_token"],
        queries="num_query",
        find_tower=lambda config: config.tower or EVA,
        make_tokenizer=lambda model: tiny_tokenizer(model.image_token, model.template, TOKENS),
        check=lambda folder, model: None,
        mean=MEAN,
        std=STD,
    )
)
