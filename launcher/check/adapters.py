"""Rules about what a stage trains: LoRA targets, the base model of an adapter, learning rates of groups, and groups that are reset."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from launcher.check.problem import Problem, Rule
from launcher.config.schema import GROUPS, Config, Model
from launcher.errors import suggest
from launcher.image.stack import Stack
from launcher.memory.states import REGEX, linear_names, linear_shapes, vocabulary
from trainer.contract.wording import plural

DEFAULT_GROUPS = ("lm",)  # of Lora.base_groups
MOST_TOKENS = 10_000  # of model.add_tokens
SHOWN_TOKENS = 5


def lora_targets_exist(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """A target is the name of a linear layer of the decoder, or `re:` and a regular expression that matches whole module names."""
    lora, shapes = config.stage.lora, linear_shapes(config.model.architecture.text)
    if lora is None:
        return
    for target in (target for target in lora.targets if target.startswith(REGEX)):
        yield from judge_regex(config, target)
    unknown = [target for target in lora.targets if not target.startswith(REGEX) and target not in shapes]
    if unknown or not lora.targets:
        what = (
            f"the decoder has no {', '.join(unknown)}; {suggest(unknown[0], shapes)}"
            if unknown
            else "is empty: LoRA needs at least one target"
        )
        yield Problem(key="stage.lora.targets", what=what, changes=(f"stage.lora.targets=[{','.join(shapes)}]",))
    if "lm" in config.stage.trainable:
        rest = ",".join(group for group in config.stage.trainable if group != "lm")
        what = "lm would be trained both in full and by LoRA"
        yield Problem(key="stage.trainable", what=what, changes=(f"stage.trainable=[{rest}]", "stage.lora=null"))


def judge_regex(config: Config, target: str) -> Iterator[Problem]:
    names = linear_names(config.model)
    example = next(iter(names), "")
    changes = (rf"stage.lora.targets=['{REGEX}.*\.q_proj']", "stage.lora.targets=[q_proj]")
    try:
        pattern = re.compile(target.removeprefix(REGEX))
    except (re.error, RecursionError, OverflowError) as error:
        yield Problem(key="stage.lora.targets", what=f"{target!r} is not a regular expression: {error}", changes=changes)
        return
    if not any(pattern.fullmatch(name) for name in names):
        what = f"{target!r} matches no linear layer of the decoder; it must match whole names, as {example}"
        yield Problem(key="stage.lora.targets", what=what, changes=changes)


def quantized_base_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """bitsandbytes has kernels for CUDA (compute capability 6.0 and newer, docs/source/installation.mdx). It keeps the quantization state of a
    4-bit weight in an attribute, which ZeRO 3 does not shard with the weight."""
    lora, strategy = config.stage.lora, config.strategy
    if lora is None or not lora.base:
        return
    if config.hardware.accelerator != "cuda":
        what = f"{lora.base} needs bitsandbytes, which works on CUDA devices; {config.hardware.title} is {config.hardware.accelerator}"
        yield Problem(key="stage.lora.base", what=what, changes=("stage.lora.base=''",))
    if strategy.name == "zero3" or strategy.offload_parameters:
        what = f"{strategy.name} shards weights, which is not possible with weights in {lora.base}"
        yield Problem(key="strategy", what=what, changes=("strategy=zero2 strategy.offload_parameters=false", "stage.lora.base=''"))


def base_groups_are_frozen(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    lora, key = config.stage.lora, "stage.lora.base_groups"
    if lora is None:
        return
    if not lora.base_groups:
        yield Problem(key=key, what="is empty; stage.lora.base='' packs no group", changes=(f"{key}=[lm]",))
    if not lora.base and lora.base_groups != DEFAULT_GROUPS:
        what = f"{', '.join(lora.base_groups)} has no effect without stage.lora.base=nf4"
        yield Problem(key=key, what=what, changes=("stage.lora.base=nf4", f"{key}=[{','.join(DEFAULT_GROUPS)}]"))
    if lora.base and "vision" in lora.base_groups and "vision" in config.stage.trainable:
        rest = ",".join(group for group in config.stage.trainable if group != "vision")
        what = f"vision is trained whole, which is not possible in {lora.base}"
        yield Problem(key=key, what=what, changes=(f"{key}=[lm]", f"stage.trainable=[{rest}]"))


def group_rates_are_of_trained_groups(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    stage = config.stage
    unknown = sorted(set(stage.optimizer.group_lr) - set(GROUPS))
    idle = sorted(set(stage.optimizer.group_lr) - set(stage.trainable) - set(unknown))
    for group in unknown:
        yield Problem(key=f"stage.optimizer.group_lr.{group}", what=f"there is no group {group}; {suggest(group, GROUPS)}")
    if stage.kind == "train" and idle:
        trained = ", ".join(stage.trainable) or "adapters only, whose rate is stage.optimizer.lr"
        what = f"this stage does not train {', '.join(idle)}; it trains {trained}"
        yield Problem(key="stage.optimizer.group_lr", what=what, changes=(f"stage.trainable=[{','.join((*stage.trainable, *idle))}]",))
    for group, rate in stage.optimizer.group_lr.items():
        if not 0 < rate <= 1 or math.isnan(rate):
            key = f"stage.optimizer.group_lr.{group}"
            yield Problem(key=key, what=f"{rate:g} is out of range; it must be above 0 and at most 1", changes=(f"{key}=1e-5",))


def reset_groups_are_trained(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    stage = config.stage
    frozen = [group for group in stage.reset if group not in stage.trainable]
    if frozen:
        what = f"{', '.join(frozen)} would be reset and stay random, because this stage does not train it"
        kept = ",".join(group for group in stage.reset if group not in frozen)
        trained = ",".join((*stage.trainable, *frozen))
        yield Problem(key="stage.reset", what=what, changes=(f"stage.reset=[{kept}]", f"stage.trainable=[{trained}]"))


def added_tokens_are_new_words(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """What can be said without the tokenizer: the trainer refuses a token that the tokenizer has already."""
    tokens, model = config.model.add_tokens, config.model
    wrong = [f"{token!r} is empty or has a space" for token in tokens if token.split() != [token]]
    wrong += [f"{token!r} is listed {count} times" for token, count in Counter(tokens).items() if count > 1]
    inside = (token for token in tokens if token.strip() and is_of_template(token, model))
    wrong += [f"{token!r} is the image token or part of the chat template" for token in inside]
    if wrong:
        kept = [token for token in dict.fromkeys(tokens) if token.split() == [token] and not is_of_template(token, model)]
        more = f"; and {len(wrong) - SHOWN_TOKENS} more" if len(wrong) > SHOWN_TOKENS else ""
        yield Problem(key="model.add_tokens", what="; ".join(wrong[:SHOWN_TOKENS]) + more, changes=(write_tokens(kept),))
    if len(tokens) > MOST_TOKENS:
        what = f"{len(tokens):,} tokens; at most {MOST_TOKENS:,}: each needs many rows that it occurs in"
        yield Problem(key="model.add_tokens", what=what, changes=("model.add_tokens=[]",))


def is_of_template(token: str, model: Model) -> bool:
    """Whether a new token would cut the texts around messages in another way than those that the model was trained with."""
    template = model.template
    frames = (template.system, template.user, template.system_frame, template.tool, template.reasoning)
    texts = (*(frame.replace("{content}", "") for frame in frames), template.assistant_open, template.end_mark, template.separator)
    return token == model.image_token or any(token in text for text in texts)


def write_tokens(tokens: Sequence[str]) -> str:
    """As an override that a shell passes on."""
    return shlex.quote(f"model.add_tokens={json.dumps(list(tokens), ensure_ascii=False, separators=(',', ':'))}")


def added_tokens_are_trained(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """peft's trained rows are not gathered under ZeRO 3 (peft 0.21, tuners/trainable_tokens/layer.py, knows CUDA and its own partitioning)."""
    stage = config.stage
    if not config.model.add_tokens or stage.kind != "train":
        return
    if stage.lora is None and "lm" not in stage.trainable:
        what = f"the stage {stage.name} trains neither embeddings nor rows of them: the tokens would stay as they start"
        yield Problem(key="model.add_tokens", what=what, changes=("stage=lora", "stage=full"))
    if stage.lora is not None and (config.strategy.name == "zero3" or config.strategy.offload_parameters):
        what = "the rows of new tokens beside LoRA cannot be trained under ZeRO 3, which shards the embeddings that they replace"
        yield Problem(key="strategy", what=what, changes=("strategy=zero2 strategy.offload_parameters=false", "stage=full"))


def write_token_notes(config: Config) -> Iterator[str]:
    tokens, rows = config.model.add_tokens, config.model.architecture.text.vocab_size
    if tokens:
        grown = f"embeddings and head grow from {rows:,} to at most {vocabulary(config):,} rows"
        yield f"model.add_tokens: {plural(len(tokens), 'new token')}; {grown}, fewer where the tokenizer leaves rows unused"


ADAPTER_RULES: tuple[Rule, ...] = (
    lora_targets_exist,
    quantized_base_is_possible,
    base_groups_are_frozen,
    group_rates_are_of_trained_groups,
    reset_groups_are_trained,
    added_tokens_are_new_words,
    added_tokens_are_trained,
)
