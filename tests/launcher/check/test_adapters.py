"""Rules about adapters, rates of groups and groups that are reset."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.check.rules import Verdict, check
from launcher.config.compose import compose
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.memory.states import lora_parameters, model_states
from launcher.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[3]
LORA = ("stage=lora", "model=qwen2_5_vl_7b", "hardware=h200")


def judge(*words: str) -> Verdict:
    return check(compose(words, ROOT / "conf"), load_stacks(ROOT / "images"))


def refusal(*words: str) -> str:
    return "\n".join(map(str, judge(*words).problems))


@pytest.mark.parametrize("targets", ["[q_proj,v_proj]", r"['re:.*\.q_proj']", r"[v_proj,'re:.*\.layers\.[0-3]\.mlp\.up_proj']"])
def test_targets_are_names_or_regexes(targets: str) -> None:
    assert "stage.lora.targets" not in refusal(*LORA, f"stage.lora.targets={targets}")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("[]", "is empty: LoRA needs at least one target"),
        ("[qproj]", r"the decoder has no qproj; did you mean 'q_proj'"),
        ("['re:(']", r"'re:\(' is not a regular expression"),
        (
            r"['re:q_proj']",
            r"matches no linear layer of the decoder; it must match whole names, as model.language_model.layers.0.self_attn",
        ),
    ],
)
def test_targets_that_hit_nothing_are_refused(targets: str, said: str) -> None:
    import re

    assert re.search(said, refusal(*LORA, f"stage.lora.targets={targets}"))


def test_a_regex_counts_as_the_names_that_it_matches() -> None:
    by_name, by_regex, two_layers = (
        lora_parameters(compose([*LORA, f"stage.lora.targets={targets}"], ROOT / "conf"))
        for targets in ("[q_proj]", r"['re:.*\.q_proj']", r"['re:.*\.layers\.[01]\.self_attn\.q_proj',q_proj]")
    )
    assert by_name == by_regex == two_layers, "what a name has counted, a regex does not count again"
    assert (
        lora_parameters(compose([*LORA, r"stage.lora.targets=['re:.*\.layers\.[01]\.self_attn\.q_proj']"], ROOT / "conf")) == by_name // 14
    )


def test_four_bits_are_for_cuda_and_for_whole_weights() -> None:
    assert "stage.lora.base" not in refusal(*LORA, "stage.lora.base=nf4") and "strategy" not in refusal(*LORA, "stage.lora.base=nf4")
    for hardware in ("cpu", "ascend910b"):
        assert "bitsandbytes, which works on CUDA devices" in refusal("stage=lora", f"hardware={hardware}", "stage.lora.base=nf4")
        assert "would pass: stage.lora.base=''" in refusal("stage=lora", f"hardware={hardware}", "stage.lora.base=nf4")
    assert "zero3 shards weights" in refusal(*LORA, "stage.lora.base=nf4", "strategy=zero3")


def test_four_bits_take_a_quarter_of_sixteen() -> None:
    """7.07 G of the 8.29 G parameters are the language model; all but its embeddings and norms are quantized."""
    whole, packed = (
        model_states(compose([*LORA, "precision=bf16", "strategy=ddp", f"stage.lora.base={base}"], ROOT / "conf")) for base in ("''", "nf4")
    )
    saved = whole.items_bytes["weights"] - packed.items_bytes["weights"]
    linears = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert saved == linears * 2 - -(-linears * (4 + 8 / 64 + 32 / (64 * 256)) // 8)
    assert whole.trainable == packed.trainable


def test_a_rate_of_a_group_that_does_not_train_is_refused() -> None:
    assert not refusal("stage.optimizer.group_lr.projector=2e-5")
    assert "this stage does not train vision; it trains projector" in refusal("stage=projector", "stage.optimizer.group_lr.vision=1e-6")
    assert "stage.optimizer.group_lr.projector: 2 is out of range" in refusal("stage.optimizer.group_lr.projector=2")


def test_a_group_is_reset_only_where_it_trains(plan_for: Callable[..., Plan]) -> None:
    assert "vision would be reset and stay random" in refusal("stage=projector", "stage.reset=[vision]")
    plan = plan_for("stage=projector", "stage.reset=[projector]")
    assert (plan.spec.stage.reset, plan.spec.stage.needs) == (("projector",), ())
    plan = plan_for("stage=lm", "stage.checkpoint=/c")
    assert plan.spec.stage.needs == ("projector",), "that a checkpoint is needed is the launcher's to see"


def test_a_group_that_no_model_has_cannot_be_reset() -> None:
    with pytest.raises(ConfigRefused, match=r"stage\.reset"):
        compose(["stage.reset=[audio]"], ROOT / "conf")


@pytest.mark.parametrize("part", ["audio", "speech", "apm", "tts"])
def test_why_audio_and_speech_are_not_trained(part: str) -> None:
    with pytest.raises(ConfigRefused) as caught:
        compose(["model=minicpm_o_2_6", f"stage.trainable=[lm,{part}]"], ROOT / "conf")
    said = str(caught.value)
    assert f'stage.trainable.1 (override stage.trainable=[lm,{part}]): "{part}" is not allowed' in said
    assert "are never trained: the data has no sound" in said and "valid are: head, lm, projector, vision" in said


@pytest.mark.parametrize(
    ("words", "said", "change"),
    [
        (("stage.lora.base=nf4", "stage.lora.base_groups=[]"), "is empty", "stage.lora.base_groups=[lm]"),
        (("stage.lora.base_groups=[lm,vision]",), "has no effect without stage.lora.base=nf4", "stage.lora.base=nf4"),
        (
            ("stage.lora.base=nf4", "stage.lora.base_groups=[lm,vision]", "stage.trainable=[vision]"),
            "vision is trained whole, which is not possible in nf4",
            "stage.trainable=[]",
        ),
    ],
)
def test_groups_in_four_bits_are_frozen(words: tuple[str, ...], said: str, change: str) -> None:
    text = refusal(*LORA, *words)
    assert f"stage.lora.base_groups: {said}" in text or f"stage.lora.base_groups: lm, vision {said}" in text
    assert change in text
