"""`omnilaunch options`: one line for each value and key, in 80 columns; details of one key; search; JSON."""

import json

import pytest

from launcher.cli import main
from launcher.commands.options import WIDTH
from launcher.config.schema import AXES
from launcher.plan.text import measure


def say(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["options", *words]) == 0
    return capsys.readouterr().out


ASKED = ("", "hardware", "model", "stage", "cluster", "tune", "run", "stage.serving", "stage.optimizer.lr", "model.image_tokens.max_pixels")


@pytest.mark.parametrize("words", [*ASKED, "--search learning", "--search gpu"])
def test_a_line_fits_a_narrow_terminal(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, *words.split())
    long = [line for line in text.splitlines() if len(line) > WIDTH]
    assert text and not long, long


def test_every_axis_is_shown_with_its_values_and_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    lines = say(capsys).splitlines()
    assert [line for line in lines if line in AXES] == [*AXES]
    assert "  ascend910b  Huawei Ascend 910B (Atlas A2)" in lines and "* cpu         CPU" in lines
    assert any(line.startswith("  zero3 ") and line.endswith("(ZeRO 3)") for line in lines)


def test_the_chosen_value_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "precision", "hardware=p4")
    assert "* fp16 " in text and "* fp32" not in text and "precision.weights=float16" in text
    assert "* lora " in say(capsys, "stage=lora")


def test_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "stage.optimizer.lr", "model=qwen2_5_vl_7b", "stage=lora")
    for part in (
        "type      a number",
        "current   0.0001",
        "set by    conf/stage/lora.yaml",
        "default   none",
        "words     learning_rate, lr",
        "write     stage.optimizer.lr=0.0001",
    ):
        assert part in text
    assert "allowed   constant, linear, cosine" in say(capsys, "stage.optimizer.schedule")


def test_a_section_shows_its_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "stage.optimizer", "stage.optimizer.lr=3e-5")
    assert "  stage.optimizer.lr=3e-05 " in text and "stage.optimizer.clip_norm=1.0" in text


def test_a_fact_is_shown_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "model.image_tokens.max_pixels", "model=qwen2_5_vl_7b")
    assert "current   1003520" in text and "data.max_pixels=VALUE" in text and "  write" not in text
    assert "hardware.peaks" not in say(capsys, "hardware")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    every = json.loads(say(capsys, "--json"))
    assert every["values"]["hardware"]["h200"] == "NVIDIA H200"
    (key,) = json.loads(say(capsys, "run.steps", "run.steps=7", "--json"))
    assert (key["key"], key["current"], key["place"]) == ("run.steps", "7", "override run.steps=7")
    found = json.loads(say(capsys, "--search", "cutoff", "--json"))
    assert found["words"]["cutoff_len"].startswith("write data.max_length=VALUE")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("learning_rate",), "unknown key 'learning_rate'; write stage.optimizer.lr=VALUE"),
        (("run.stpes",), "did you mean 'steps'?"),
        (("hardware=gpu",), "write hardware=h200, hardware=rtx3090 or hardware=p4"),
        (("--search", "xyzzy"), "nothing is called or means 'xyzzy'"),
    ],
)
def test_an_unknown_word_gets_a_hint(words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("梯度累积", "set by stage.global_batch"),
        ("学习率", "write stage.optimizer.lr=VALUE"),
        ("批大小", "write stage.global_batch=VALUE or strategy.micro_batch=VALUE"),
        ("批次", "strategy.micro_batch=VALUE"),
        ("图像分辨率", "data.max_pixels"),
        ("显存", "omnilaunch plan shows the memory"),
        ("精度", "write precision=NAME, one of bf16, fp16"),
        ("断点续训", "omnilaunch launch --resume RUN"),
        ("量化", "stage=quantize"),
        ("合并", "write stage=merge"),
        ("推理", "write stage=infer"),
        ("部署", "write stage=serve"),
        ("数据集", "data.train=VALUE"),
        ("轮数", "write run.epochs=VALUE"),
        ("预热", "write stage.optimizer.warmup=VALUE"),
        ("学习率调度", "write stage.optimizer.schedule=VALUE"),
        ("早停", "write run.early_stop.patience=VALUE"),
        ("冻结", "stage.trainable"),
        ("多机", "conf/cluster/example.yaml"),
        ("镜像", "images/versions.yaml"),
        ("随机种子", "write run.seed=VALUE"),
        ("昇腾", "hardware=ascend910b"),
        ("learnig_rate", "write stage.optimizer.lr=VALUE"),
        ("gradient_acumulation", "set by stage.global_batch"),
        ("freeze_vit", "stage.trainable without vision"),
        ("CUDA_VISIBLE_DEVICES", "plan and launch use CUDA_VISIBLE_DEVICES for a run on this machine"),
    ],
)
def test_a_search_finds(word: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert text in say(capsys, "--search", word)


def test_a_typing_error_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "--search", "learnig_rate", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "nothing is called 'learnig_rate'; this is for learning_rate\n" and "learning_rate" in json.loads(said.out)["words"]


@pytest.mark.parametrize("columns", [60, 160])
def test_lines_are_as_wide_as_the_terminal(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Chinese character takes two columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    widths = [measure(line) for word in ("learning", "冻结") for line in say(capsys, "--search", word).splitlines()]
    assert columns - 12 < max(widths) <= columns
