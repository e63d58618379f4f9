"""What a checkpoint is decides the plan: model, limits of images and adapter come from its record, and contradictions are refused."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher.check.rules import check
from launcher.config.compose import compose, compose_over
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import LocalContext, Plan, make_plan
from launcher.plan.short import describe_short
from launcher.record.checkpoint.checkpoint_config import compose_from_checkpoint
from launcher.record.checkpoint.checkpoint_record import FINGERPRINT_BYTES
from launcher.record.record import SourceState, name_run, open_run, valid_run_id
from trainer.contract import CHECKPOINTS, SCHEMA
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, STATE_FILE
from trainer.contract.weight_files import hash_weights

ROOT = Path(__file__).resolve().parents[4]
CONF = ROOT / "conf"
STACKS = load_stacks(ROOT / "images")
SOURCE = SourceState(commit="", dirty=False)
Make = Callable[..., Path]


@pytest.fixture
def make_run(plan_for: Callable[..., Plan], tmp_path: Path) -> Make:
    """A finished run on this machine: its plan, and one checkpoint."""

    def make(run_id: str, *words: str, trained: tuple[str, ...] = (), base: str | None = "", config: dict[str, Any] | None = None) -> Path:
        made = plan_for(f"cluster.root={tmp_path}", "run.force=for a test", *words)
        plan = replace(made, run_id=run_id, folder=str(tmp_path / "runs" / run_id))
        plan = replace(plan, spec=replace(plan.spec, run_id=run_id, output=plan.folder))
        folder = open_run(plan, SOURCE) / CHECKPOINTS / CHECKPOINT_NAME.format(step=3)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "x"}), encoding="utf-8")
        if plan.spec.stage.lora:
            (folder / "adapter_config.json").write_text(
                json.dumps({"base_model_name_or_path": str(tmp_path) if base == "" else base}), encoding="utf-8"
            )
        spec = {"model.name": plan.spec.model.name, "stage.name": plan.spec.stage.name, "stage.kind": plan.spec.stage.kind}
        state = {"schema": SCHEMA, "step": 3, "weights_sha256": "", "data_sha256": "", "world_size": 0, "spec": spec, "files": {}}
        (folder / STATE_FILE).write_text(json.dumps({**state, "run_id": run_id, "trained": trained}), encoding="utf-8")
        return folder

    return make


def composed(tmp_path: Path, *words: str, conf: Path = CONF) -> Config:
    return compose_from_checkpoint((f"cluster.root={tmp_path}", *words), conf, tmp_path)


def problems(tmp_path: Path, *words: str) -> dict[str, str]:
    given = (f"cluster.root={tmp_path}", *words)
    again = partial(compose_from_checkpoint, conf=CONF, here=tmp_path)
    place = LocalContext(project=ROOT, here=tmp_path, interpreter="python", user="0:0")
    try:
        make_plan(again(given), STACKS, place, run_id="R", overrides=given, compose=again)
    except ConfigRefused as error:
        lines = str(error).splitlines()[1:]
        keys = [line.strip().partition(":")[0] for line in lines if not line.startswith("    ")]
        return dict(zip(keys, ["\n".join(lines)] * len(keys), strict=True))
    return {}


# ------------------------------------------------------------------------------------------------------------ what is taken


@pytest.mark.parametrize("stage", ["evaluate", "infer", "serve", "convert", "quantize", "full", "lora", "lm"])
def test_the_model_and_the_limits_of_images_are_those_of_the_record(stage: str, make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_qwen2_5_vl", "data.max_pixels=512")
    config = composed(tmp_path, f"stage={stage}", "stage.checkpoint=A")
    assert (config.model.name, config.data.max_pixels) == ("tiny_qwen2_5_vl", 512)
    assert config.stage.recorded is not None and config.stage.recorded.taken == ("model=tiny_qwen2_5_vl", "data.max_pixels=512")


@pytest.mark.parametrize("text", ["A", "A/3", "last", "last/3", "runs/A", "runs/A/checkpoints", "runs/A/checkpoints/step-000003"])
def test_every_way_to_name_a_checkpoint(text: str, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run("A", "model=tiny_internvl", "data.max_tiles=2")
    config = composed(tmp_path, "stage=serve", f"stage.checkpoint={text}")
    assert (config.model.name, config.data.max_tiles) == ("tiny_internvl", 2)
    assert Path(config.stage.checkpoint).resolve() == folder


def test_what_the_user_typed_is_kept(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_qwen2_5_vl", "data.max_pixels=512")
    config = composed(tmp_path, "stage=serve", "stage.checkpoint=A", "data.max_pixels=1024", "model.context=900")
    assert config.data.max_pixels == 1024 and config.model.context == 900 and config.stage.recorded is not None
    assert config.stage.recorded.taken == ("model=tiny_qwen2_5_vl",)


def test_a_limit_that_the_recorded_model_ignores_is_refused(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_internvl")
    with pytest.raises(ConfigRefused, match=r"tiny_internvl has no such limit; write data\.max_tiles=N"):
        composed(tmp_path, "stage=serve", "stage.checkpoint=A", "data.max_pixels=1024")


def test_the_recorded_section_is_used_and_not_todays_file(make_run: Make, tmp_path: Path) -> None:
    """The run was trained with another depth than conf/model has; its name, typed or not, means that model."""
    make_run("A", "model=tiny_llava", "model.architecture.text.num_hidden_layers=5")
    for words in ((), ("model=tiny_llava",)):
        config = composed(tmp_path, "stage=serve", "stage.checkpoint=A", *words)
        assert config.model.architecture.text.num_hidden_layers == 5 and config.stage.recorded is not None
        assert config.stage.recorded.differences == ()


def test_a_model_that_conf_lacks_is_taken_from_the_record(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_omnilmm_3b")
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "model/tiny_omnilmm_3b.yaml").unlink()
    config = composed(tmp_path, "stage=lora", "stage.checkpoint=A", conf=conf)
    assert config.model == compose(["model=tiny_omnilmm_3b"], CONF).model
    assert config.stage.lora == compose(["stage=lora", "tune=null"], CONF).stage.lora, "not the tuned settings of the default model"


def test_tuned_settings_are_those_of_the_models_own(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_omnilmm_3b")
    config = composed(tmp_path, "stage=lora", "stage.checkpoint=A")
    assert config.stage.lora == compose(["model=tiny_omnilmm_3b", "stage=lora"], CONF).stage.lora
    assert config.run.steps == 150


def test_a_lora_stage_takes_the_settings_of_the_adapter_that_it_continues(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "stage=lora", "stage.checkpoint=x", "stage.lora.r=4", "stage.lora.targets=[q_proj]")
    config = composed(tmp_path, "stage=lora", "stage.checkpoint=A", "tune=null")
    assert config.stage.lora is not None and (config.stage.lora.r, config.stage.lora.targets) == (4, ("q_proj",))
    assert config.stage.recorded is not None and "stage.lora.targets=[q_proj]" in config.stage.recorded.taken
    assert problems(tmp_path, "stage=lora", "stage.checkpoint=A") == {}


def test_derived_weights_have_the_limits_of_their_source(make_run: Make, tmp_path: Path) -> None:
    """Records of earlier versions have no limit with merged weights, whose processor was saved with it."""
    source = make_run("A", "model=tiny_qwen2_5_vl", "data.max_pixels=512")
    merged = make_run("M", "model=tiny_qwen2_5_vl", "stage=merge", f"stage.checkpoint={source}")
    make_run("C", "model=tiny_qwen2_5_vl", "stage=convert", f"stage.checkpoint={merged}")
    assert composed(tmp_path, "stage=serve", "stage.checkpoint=C").data.max_pixels == 512


def test_a_copied_checkpoint_is_known_by_its_state(make_run: Make, tmp_path: Path) -> None:
    copied = shutil.copytree(make_run("A", "model=tiny_internvl"), tmp_path / "copied")
    shutil.rmtree(tmp_path / "runs")
    assert composed(tmp_path, "stage=serve", f"stage.checkpoint={copied}").model.name == "tiny_internvl"
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "model/tiny_internvl.yaml").unlink()
    with pytest.raises(ConfigRefused, match="is of model tiny_internvl, which conf/model lacks, and it is not in its run's folder"):
        composed(tmp_path, "stage=serve", f"stage.checkpoint={copied}", conf=conf)


def test_a_folder_of_no_run_of_ours_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}", encoding="utf-8")
    config = composed(tmp_path, "stage=serve", f"stage.checkpoint={tmp_path / 'hf'}")
    assert config.stage.recorded is None and config.model.name == "tiny_llava"


def test_the_short_plan_says_what_was_taken_and_from_where(make_run: Make, plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    make_run("A", "model=tiny_qwen2_5_vl", "data.max_pixels=512")
    plan = replace(plan_for("stage=serve", "stage.checkpoint=x"), config=composed(tmp_path, "stage=serve", "stage.checkpoint=A"))
    text = " ".join(describe_short(plan).split())
    assert "assumptions: from the record of run A (stage full of tiny_qwen2_5_vl): model=tiny_qwen2_5_vl, data.max_pixels=512" in text
    assert "16 answers at a time, each with a context of" in text


# ---------------------------------------------------------------------------------------------------------- contradictions


def test_another_model_is_refused_with_the_recorded_one(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_qwen2_5_vl")
    found = problems(tmp_path, "stage=serve", "stage.checkpoint=A", "model=tiny_llava")
    assert "its family is qwen2_5_vl, and not llava" in found["model"] and "would pass: model=tiny_qwen2_5_vl" in found["model"]
    sized = problems(tmp_path, "stage=serve", "stage.checkpoint=A", "model=qwen2_5_vl_7b")
    assert "its text.hidden_size is 64, and not 3584" in sized["model"]
    typed = problems(tmp_path, "stage=serve", "stage.checkpoint=A", "model.architecture.text.num_hidden_layers=9")
    assert "its text.num_hidden_layers is 2, and not 9" in typed["model"] and "would pass" not in typed["model"]


def test_memory_is_judged_for_the_recorded_model(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=qwen2_5_vl_7b", "hardware=h200", "stage=lm", "data.max_length=256")
    assert "stage.serving.max_batch=8" in problems(tmp_path, "stage=serve", "stage.checkpoint=A", "hardware=rtx3090")["strategy"]
    assert problems(tmp_path, "stage=serve", "stage.checkpoint=A", "hardware=rtx3090", "stage.serving.max_batch=8") == {}


@pytest.mark.parametrize(
    ("words", "config", "stage", "said"),
    [
        (("stage=full",), None, "merge", "merge needs the adapter of a LoRA run, and run A (stage full of tiny_llava) saved full weights"),
        (
            ("stage=lora", "stage.checkpoint=x"),
            None,
            "convert",
            "stage=merge stage.checkpoint=A --run-id A-merged; then stage.checkpoint=A-merged",
        ),
        (("stage=lora", "stage.checkpoint=x"), None, "quantize", "quantize needs full weights"),
        *(
            (("stage=quantize", "stage.checkpoint=Q"), {"quantization_config": {"quant_method": "compressed-tensors"}}, stage, said)
            for stage, said in (("full", "cannot be trained"), ("lora", "cannot be trained"), ("convert", "cannot be converted"))
        ),
    ],
)
def test_what_rank_0_would_refuse_is_refused_by_the_plan(
    words: tuple[str, ...], config: dict[str, Any] | None, stage: str, said: str, make_run: Make, tmp_path: Path
) -> None:
    make_run("A", *words, config=config)
    assert said in problems(tmp_path, f"stage={stage}", "stage.checkpoint=A")["stage.checkpoint"]


def test_the_source_of_quantized_weights_is_offered(make_run: Make, tmp_path: Path) -> None:
    source = make_run("S", trained=("projector", "lm", "head"))
    make_run("A", "stage=quantize", f"stage.checkpoint={source}", config={"quantization_config": {"quant_method": "compressed-tensors"}})
    assert "would pass: stage.checkpoint=S" in problems(tmp_path, "stage=full", "stage.checkpoint=A")["stage.checkpoint"]


def test_nf4_is_refused_where_nothing_reads_it(make_run: Make, tmp_path: Path) -> None:
    nf4 = ("hardware=rtx3090", "stage=quantize", "stage.checkpoint=x", "stage.quantization.scheme=nf4")
    make_run("A", *nf4, config={"quantization_config": {"quant_method": "bitsandbytes"}})
    assert (
        "NF4, which bitsandbytes reads on CUDA devices; CPU is cpu"
        in problems(tmp_path, "stage=serve", "stage.checkpoint=A")["stage.checkpoint"]
    )
    assert problems(tmp_path, "stage=serve", "stage.checkpoint=A", "hardware=rtx3090") == {}


def test_other_settings_of_an_adapter_are_refused_with_its_own(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "stage=lora", "stage.checkpoint=x", "stage.lora.r=4")
    found = problems(tmp_path, "stage=lora", "stage.checkpoint=A", "stage.lora.r=16")
    assert "r is 16, the adapter has 4" in found["stage.lora"] and "would pass: stage.lora.r=4" in found["stage.lora"]


def test_a_projector_that_no_run_trained_is_refused(make_run: Make, tmp_path: Path) -> None:
    make_run("A", trained=("lm",))
    assert "stage lora needs a trained projector" in problems(tmp_path, "stage=lora", "stage.checkpoint=A")["stage.checkpoint"]


def write_weights(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content)


@pytest.mark.parametrize("stage", ["evaluate", "merge", "infer", "serve", "convert", "quantize", "lora", "full"])
def test_an_adapter_of_random_weights_is_refused(stage: str, make_run: Make, tmp_path: Path) -> None:
    """Its plan was ok, and rank 0 ended with a TypeError of pathlib."""
    folder = make_run("A", "stage=lora", "stage.needs=[]", "model=tiny_llava", base=None)
    copied = shutil.copytree(folder, tmp_path / "copied")
    for name in ("A", str(copied)):
        with pytest.raises(ConfigRefused) as found:
            composed(tmp_path, f"stage={stage}", f"stage.checkpoint={name}")
        said = str(found.value)
        assert f"stage.checkpoint={name}: it is an adapter, and its base was random weights of tiny_llava, which no disk has" in said
    advice = [words.split(" --run-id")[0] for words in re.findall(r"omnilaunch launch (.*? --run-id \S+)", said)]
    assert advice == ["model=tiny_llava stage=full"] and problems(tmp_path, *advice[0].split()) == {}


def test_an_adapter_without_its_base_or_with_another_is_refused(make_run: Make, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_weights(base, b"1234")
    folder = make_run("A", "stage=lora", "stage.checkpoint=x", base=str(base))
    state = json.loads((folder / STATE_FILE).read_text())
    (folder / STATE_FILE).write_text(json.dumps({**state, "base": hash_weights(base, most_bytes=FINGERPRINT_BYTES)}))
    assert composed(tmp_path, "stage=serve", "stage.checkpoint=A").stage.recorded is not None
    write_weights(base, b"1235")
    with pytest.raises(ConfigRefused, match=r"stage\.checkpoint=A: it is an adapter that was trained on other weights than those now in"):
        composed(tmp_path, "stage=serve", "stage.checkpoint=A")
    shutil.rmtree(base)
    with pytest.raises(
        ConfigRefused, match=r"stage\.checkpoint=A: .* is an adapter, and its base .* is not there\. Name .*stage\.base=FOLDER"
    ):
        composed(tmp_path, "stage=serve", "stage.checkpoint=A")


# ------------------------------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": SCHEMA + 1}, rf"was written with schema {SCHEMA + 1}, this version reads 1\. Use the version that wrote it"),
        ({"config": {}}, "cannot be read by this version"),
    ],
)
def test_a_record_of_another_schema_is_refused_in_clear_words(change: dict[str, Any], said: str, make_run: Make, tmp_path: Path) -> None:
    make_run("A")
    file = tmp_path / "runs/A/plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    with pytest.raises(ConfigRefused, match=rf"stage\.checkpoint=A: .*plan\.json {said}"):
        composed(tmp_path, "stage=serve", "stage.checkpoint=A")


@pytest.mark.parametrize("copied", [False, True])
def test_a_foreign_record_cannot_command_the_terminal(copied: bool, make_run: Make, plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    folder, bad = make_run("A", "stage=lora", "stage.checkpoint=x", "model=tiny_llava"), "\033[31m\033[2J\n"
    if copied:
        folder = Path(shutil.copytree(folder, tmp_path / "copied"))
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state |= {"run_id": f"A{bad}", "trained": [f"projector{bad}"]}
        state["spec"]["stage.name"] = f"lora{bad}"
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    else:
        file = folder.parents[1] / "plan.json"
        plan = json.loads(file.read_text(encoding="utf-8"))
        plan["run_id"] = f"A{bad}"
        plan["config"]["stage"]["name"] = f"lora{bad}"
        plan["config"]["model"]["name"] = f"m{bad}"
        plan["spec"]["stage"]["checkpoint"] = f"/x{bad}"
        file.write_text(json.dumps(plan), encoding="utf-8")
    config = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", "data=digits")
    texts = [str(problem) for problem in check(config, STACKS).problems]
    texts += describe_short(replace(plan_for(), config=config)).splitlines()
    assert any(r"A\x1b[31m\x1b[2J\n" in text for text in texts)
    assert all(line.isprintable() for text in texts for line in text.splitlines())
    assert valid_run_id(name_run(config, datetime(2026, 12, 1, tzinfo=UTC), pid=7))


def test_an_older_plan_without_newer_keys_is_read(make_run: Make, tmp_path: Path) -> None:
    make_run("A", "model=tiny_internvl")
    file = tmp_path / "runs/A/plan.json"
    plan = json.loads(file.read_text())
    del plan["config"]["model"]["packable"], plan["config"]["stage"]["recorded"], plan["config"]["data"]["max_tiles"]
    file.write_text(json.dumps(plan), encoding="utf-8")
    assert composed(tmp_path, "stage=serve", "stage.checkpoint=A").model.name == "tiny_internvl"


def test_what_the_record_says_is_not_typed(tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused, match=r"is read from the record of stage\.checkpoint"):
        compose(["stage.recorded.quantized=nf4"], CONF)


def test_another_checkpoint_of_a_rerun_is_not_described_by_the_old_record(make_run: Make, tmp_path: Path) -> None:
    make_run("A")
    config = composed(tmp_path, "stage=serve", "stage.checkpoint=A")
    assert compose_over(config, ("run.seed=2",), CONF).stage.recorded == config.stage.recorded
    assert compose_over(config, ("stage.checkpoint=/other",), CONF).stage.recorded is None


def test_the_rules_say_nothing_without_a_record() -> None:
    assert check(compose(["stage=serve", "stage.checkpoint=/x"], CONF), STACKS).ok


# --------------------------------------------------------------------------------------- system message and chat template


def test_weights_are_asked_with_the_system_message_they_were_trained_with(make_run: Make, tmp_path: Path) -> None:
    make_run("one", "model=tiny_llava", "data.system='Be brief.'")
    for stage in ("infer", "serve", "evaluate"):
        config = composed(tmp_path, f"stage={stage}", "stage.checkpoint=one")
        assert config.data.system == "Be brief."
        assert "data.system='Be brief.'" in config.stage.recorded.taken  # type: ignore[union-attr]
    assert composed(tmp_path, "stage=serve", "stage.checkpoint=one", "data.system=none").data.system == "none"
    assert composed(tmp_path, "stage=full", "stage.checkpoint=one").data.system == "row"


def test_the_chat_template_of_a_run_is_that_of_its_record(make_run: Make, tmp_path: Path) -> None:
    make_run("one", "model=tiny_llava", "model.chat_template=checkpoint")
    make_run("two", "model=tiny_llava")
    plan = json.loads((tmp_path / "runs" / "two" / "plan.json").read_text(encoding="utf-8"))
    assert plan["spec"]["model"]["chat_template"] == plan["config"]["model"].pop("chat_template") == "auto"
    del plan["config"]["data"]["system"]
    for key in ("system_frame", "tool", "reasoning"):
        del plan["config"]["model"]["template"][key]
    (tmp_path / "runs" / "two" / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert composed(tmp_path, "stage=serve", "stage.checkpoint=one").model.chat_template == "checkpoint"
    # A record of an earlier version: its run wrote conversations with model.template.
    assert composed(tmp_path, "stage=serve", "stage.checkpoint=two").model.chat_template == ""


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ((), "auto"),
        (("model.template.end_mark=</s>",), "conf"),
        (("model.template.end_mark=</s>", "model.chat_template=checkpoint"), "checkpoint"),
    ],
)
def test_a_typed_template_is_used(words: tuple[str, ...], chosen: str) -> None:
    config = compose(("model=tiny_llava", *words), CONF)
    assert config.model.chat_template == chosen
    assert compose_over(config, ("model.template.separator=x",), CONF).model.chat_template == "conf"
