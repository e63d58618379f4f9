"""What a plan says beside its verdict: once, and only where it is true."""

from dataclasses import replace
from pathlib import Path

import yaml

from launcher.check.precision import write_cast_notes
from launcher.check.rules import SUBJECTS, write_notes
from launcher.check.strategy import explain_strategy, resolve
from launcher.config.compose import compose
from launcher.config.source import RecordedWeights
from launcher.memory.estimate import estimate_memory

CONF = Path(__file__).resolve().parents[3] / "conf"
P4 = ("hardware=p4", "model=omnilmm_3b")
FILES = ("data=files", "data.train=a.json", "data.images=b", "data.max_length=512")


def test_a_peak_above_the_margin_is_said_to_be_above_it() -> None:
    said = explain_strategy(resolve(compose((*P4, "stage=lora", *FILES), CONF)))
    assert "nothing fits with at most 70% for states and 95% at the peak; the peak takes 98%, above the margin of 95%" in said
    assert said.endswith("A smaller data.max_length takes less")
    assert "above the margin" not in explain_strategy(resolve(compose(("hardware=rtx3090",), CONF)))


def test_the_route_to_nf4_does_not_lead_to_another_one() -> None:
    """Its first command noted that the model should be converted first, and its checkpoint named instead."""
    for words, noted in ((("stage=evaluate",), True), (("stage=quantize", "stage.quantization.scheme=nf4"), False)):
        assert any("convert the model once" in note for note in write_cast_notes(compose((*P4, *words), CONF))) == noted


def test_the_number_of_cards_is_not_asked_where_it_was_given() -> None:
    for words, noted in (((), True), (("cluster.devices_per_node=2",), False)):
        notes = write_notes(resolve(compose(("hardware=rtx3090", *words), CONF)))
        assert any(note.startswith("devices_per_node: two cards") for note in notes) == noted


def test_an_image_that_is_longer_than_the_context_is_said_not_to_fit() -> None:
    """It said `a context of 1,024 tokens ... and one image`, of 1,280 tokens."""
    words = ("hardware=h200", "model=qwen2_5_vl_7b", "stage=serve")
    said = {size: estimate_memory(compose((*words, f"stage.serving.context={size}"), CONF)).assumption for size in (1024, 4096)}
    assert "Such an image does not fit into the context" in said[1024] and "A larger stage.serving.context" in said[1024]
    assert "does not fit" not in said[4096]


def notes_of(*words: str) -> list[str]:
    return list(write_notes(resolve(compose(words, CONF))))


def test_weights_of_a_larger_range_than_float16_are_noted() -> None:
    """In training too, and wherever float16 was chosen; what LLaVA is published in was not verified."""
    range_of_float16 = "is loaded in float16: values above 65,504 become infinite, those below 6e-8 become 0; "
    said = {
        (
            "hardware=p4",
            "model=qwen2_5_vl_3b",
            "stage=lora",
        ): "Qwen2.5-VL-3B-Instruct is in bfloat16, which NVIDIA Tesla P4 does not have, and ",
        ("hardware=h200", "model=qwen2_5_vl_3b", "precision=fp16", "stage=full"): "Qwen2.5-VL-3B-Instruct is in bfloat16, and ",
        ("hardware=p4", "model=llava_1_5_7b", "stage=lora"): "llava-1.5-7b-hf may be in bfloat16, and ",
    }
    for words, begin in said.items():
        (note,) = (note for note in notes_of(*words) if "65,504" in note)
        assert begin + range_of_float16 in note
        command = note.partition("such values: ")[2]
        assert command.endswith("stage.conversion.unfit=refuse") and compose(command.split()[2:], CONF).stage.conversion is not None
    for words in (("hardware=p4", "precision=fp32", "model=qwen2_5_vl_3b"), ("hardware=h200", "model=qwen2_5_vl_3b"), ("hardware=p4",)):
        assert not any("65,504" in note for note in notes_of(*words)), "float32, bfloat16, and random weights"


def test_the_record_of_a_checkpoint_says_the_dtype_of_its_weights() -> None:
    config = compose((*P4, "stage=lora", "stage.checkpoint=x"), CONF)
    for dtype, noted in (("bfloat16", True), ("float32", True), ("float16", False), ("", False)):
        recorded = RecordedWeights(run_id="R", stage="full", model="omnilmm_3b", dtype=dtype)
        notes = list(write_cast_notes(replace(config, stage=replace(config.stage, recorded=recorded))))
        assert [f"x is in {dtype}" in note and "hardware=cpu stage.checkpoint=x" in note for note in notes] == [True] * noted


def test_notes_of_conf_are_of_the_plan_at_hand() -> None:
    """A plan in float32 had the note about bfloat16, and one device that of peer-to-peer traffic."""
    cases = {
        "bfloat16: ": ((("precision=bf16",), True), ((), False)),
        "several devices: ": ((("hardware=rtx3090",), True), (("hardware=rtx3090", "cluster.devices_per_node=1"), False)),
        "training: ": ((("model=minicpm_o_2_6", "stage=lora"), True), (("model=minicpm_o_2_6", "stage=serve"), False)),
        "model.source.revision is empty": (
            (("model=llava_1_5_7b", "stage=lora"), True),
            (("model=llava_1_5_7b", "stage=lora", "stage.checkpoint=x"), False),
        ),
    }
    for begin, plans in cases.items():
        for words, noted in plans:
            assert any(note.startswith(begin) for note in notes_of(*words)) == noted, (begin, words)


def test_a_subject_of_a_note_in_conf_is_known() -> None:
    """Else a note with a mistyped subject is in every plan."""
    files = [*(CONF / "hardware").glob("*.yaml"), *(CONF / "model").glob("*.yaml")]
    notes = [note for file in files for note in yaml.safe_load(file.read_text()).get("notes", ())]
    assert len(notes) >= 6
    for note in notes:
        subject, colon, _ = note.partition(": ")
        assert not colon or subject in SUBJECTS, note
