"""model.add_tokens in a plan: what is refused, and what it costs."""

import shlex
from pathlib import Path

import pytest

from launcher.check.adapters import MOST_TOKENS
from launcher.check.rules import check
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.image.stack import load_stacks
from launcher.memory.states import added_parameters, lora_parameters, model_states, trainable_parameters, vocabulary

ROOT = Path(__file__).resolve().parents[3]
BASE = ("model=tiny_llava", "data=digits", "cluster.devices_per_node=2")


def config_of(*words: str) -> Config:
    return compose([*BASE, *words], ROOT / "conf")


def refusal(*words: str) -> str:
    verdict = check(config_of(*words), load_stacks(ROOT / "images"))
    return "\n".join(str(problem) for problem in verdict.problems if problem.key in ("model.add_tokens", "strategy"))


@pytest.mark.parametrize(("tokens", "said", "offered"), [
    ('["<ok>",""]', "'' is empty or has a space", '["<ok>"]'),
    ('["a b","<ok>"]', "'a b' is empty or has a space", '["<ok>"]'),
    ('[" <ok>"]', "' <ok>' is empty or has a space", "[]"),
    ('["<ok>","<ok>"]', "'<ok>' is listed 2 times", '["<ok>"]'),
    ('["<image>"]', "'<image>' is the image token or part of the chat template", "[]"),
    ('["USER","</s>"]', "'USER' is the image token or part of the chat template; '</s>' is the image", "[]"),
])  # fmt: skip
def test_tokens_that_cannot_be_new_are_refused(tokens: str, said: str, offered: str) -> None:
    text = refusal(f"model.add_tokens={tokens}")
    assert f"model.add_tokens: {said}" in text
    (change,) = shlex.split(text.partition("would pass: ")[2])
    assert change == f"model.add_tokens={offered}" and refusal(change) == "", "what is offered passes"


def test_too_many_are_refused_by_number() -> None:
    listed = ",".join(f"t{number}" for number in range(MOST_TOKENS + 1))
    assert f"{MOST_TOKENS + 1:,} tokens; at most {MOST_TOKENS:,}" in refusal(f"model.add_tokens=[{listed}]")


@pytest.mark.parametrize(("words", "said"), [
    (("stage=projector",), "the stage projector trains neither embeddings nor rows of them"),
    (("stage=lora", "strategy=zero3"), "the rows of new tokens beside LoRA cannot be trained under ZeRO 3"),
])  # fmt: skip
def test_a_stage_that_cannot_train_them_is_refused_with_one_that_can(words: tuple[str, ...], said: str) -> None:
    text = refusal('model.add_tokens=["<loc>"]', *words)
    assert said in text and ("strategy=zero2" in text or "stage=lora" in text)


@pytest.mark.parametrize("words", [("stage=lora", "strategy=zero2"), ("stage=full", "strategy=zero3"), ("stage=lm",)])
def test_a_stage_that_trains_them_passes(words: tuple[str, ...]) -> None:
    assert refusal('model.add_tokens=["<loc>","</loc>"]', *words) == ""


def test_the_memory_counts_rows_of_embeddings_and_head() -> None:
    """384 rows of 96; three more make 448."""
    plain, grown = config_of(), config_of('model.add_tokens=["<a>","<b>","<c>"]')
    assert (vocabulary(plain), vocabulary(grown)) == (384, 448)
    assert (added_parameters(plain), added_parameters(grown)) == (0, 2 * 64 * 96)
    assert model_states(grown).parameters - model_states(plain).parameters == 2 * 64 * 96
    assert trainable_parameters(grown) - trainable_parameters(plain) == 2 * 64 * 96
    lora = [config_of("stage=lora", *more) for more in ((), ('model.add_tokens=["<a>","<b>","<c>"]',))]
    assert lora_parameters(lora[1]) - lora_parameters(lora[0]) == 2 * 3 * 96
    tied = [compose(["model=tiny_minicpm_v_4_6", *more], ROOT / "conf") for more in ((), ('model.add_tokens=["<a>"]',))]
    assert added_parameters(tied[1]) == 64 * 64 and added_parameters(tied[0]) == 0


def test_the_plan_says_how_far_the_embeddings_grow() -> None:
    notes = check(config_of('model.add_tokens=["<a>","<b>"]'), load_stacks(ROOT / "images")).notes
    (note,) = (note for note in notes if "model.add_tokens" in note)
    assert note.startswith("model.add_tokens: 2 new tokens; embeddings and head grow from 384 to at most 448 rows")
    assert not any("model.add_tokens" in note for note in check(config_of(), load_stacks(ROOT / "images")).notes)
