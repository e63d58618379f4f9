"""What a plan says beside its verdict: once, and only where it is true."""

from pathlib import Path

from launcher.check.inference import write_inference_notes
from launcher.check.rules import write_notes
from launcher.check.strategy import explain_strategy, resolve
from launcher.config.compose import compose
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
    for words, noted in ((("stage=lora",), True), (("stage=quantize", "stage.quantization.scheme=nf4"), False)):
        assert any("convert the model once" in note for note in write_inference_notes(compose((*P4, *words), CONF))) == noted


def test_the_number_of_cards_is_not_asked_where_it_was_given() -> None:
    for words, noted in (((), True), (("cluster.devices_per_node=2",), False)):
        notes = write_notes(resolve(compose(("hardware=rtx3090", *words), CONF)))
        assert any(note.startswith("devices_per_node is two cards") for note in notes) == noted


def test_an_image_that_is_longer_than_the_context_is_said_not_to_fit() -> None:
    """It said `a context of 1,024 tokens ... and one image`, of 1,280 tokens."""
    words = ("hardware=h200", "model=qwen2_5_vl_7b", "stage=serve")
    said = {size: estimate_memory(compose((*words, f"stage.serving.context={size}"), CONF)).assumption for size in (1024, 4096)}
    assert "Such an image does not fit into the context" in said[1024] and "A larger stage.serving.context" in said[1024]
    assert "does not fit" not in said[4096]
