"""Train on rows of one form, then ask without marks: infer, evaluate and serve ask what the training rows asked."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.mortal import run_ranks
from tests.trainer.serving.service import data_uri
from tests.trainer.serving.test_serve import served
from trainer.checkpoint.lineage import find_images, find_lineage
from trainer.contract import LINE_FEED, Evaluation, ImageForm, Inference, Lora, Sampling, Serving, StageSpec, TrainSpec
from trainer.contract.checkpoint_files import STATE_FILE, newest_checkpoint
from trainer.export.derived_checkpoint import describe_state

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "Which digit is this?"
LORA = Lora(r=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj"))


def write_rows(file: Path, questions: list[str], images: list[Path]) -> Path:
    rows = [
        {"image": str(image), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "7"}]}
        for question, image in zip(questions, images, strict=True)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


@pytest.fixture
def images(digits: Path) -> list[Path]:
    return sorted((digits / "digits" / "images").glob("*.png"))[:8]


@pytest.fixture
def run(tiny_spec: Callable[..., TrainSpec], tmp_path: Path) -> Callable[..., tuple[TrainSpec, str]]:
    """A run that must succeed, and what it printed."""

    def start(name: str, stage: StageSpec, **data: str) -> tuple[TrainSpec, str]:
        spec = tiny_spec(name, changes={"steps": 2, "stage": stage, "evaluation": Evaluation(batch=4, max_new_tokens=3)})
        spec = replace(spec, data=replace(spec.data, builtin="", root=str(tmp_path), **data))
        gone = run_ranks(spec)
        assert gone.codes == (0,), gone.text
        return spec, gone.text

    return start


def saved(spec: TrainSpec) -> Path:
    state = newest_checkpoint(Path(spec.output))
    assert state is not None
    return Path(spec.output) / state.path


def stage(kind: str, checkpoint: Path, **options: Any) -> StageSpec:
    return StageSpec(name=kind, kind=kind, trainable=(), checkpoint=str(checkpoint), **options)  # type: ignore[arg-type]


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


FULL = StageSpec(name="full", kind="train", trainable=("vision", "projector", "lm", "head"))


@pytest.fixture
def trained(run: Callable[..., tuple[TrainSpec, str]], tmp_path: Path, images: list[Path]) -> TrainSpec:
    """Of eight rows, seven of which have nothing after the mark, and one without a mark among the held-out rows."""
    train = write_rows(tmp_path / "train.json", [f"<image>{QUESTION}"] * 7 + [f"<image>\n{QUESTION}"], images)
    held_out = write_rows(tmp_path / "held_out.json", [QUESTION, f"<image> {QUESTION}"], images[:2])
    return run("trained", FULL, train=str(train), evaluation=str(held_out))[0]


def prompts_of(spec: TrainSpec) -> list[str]:
    return [row["prompt"] for row in read_lines(Path(spec.output) / "samples.jsonl")]


def test_infer_and_evaluate_ask_as_the_training_rows_did(
    trained: TrainSpec, run: Callable[..., tuple[TrainSpec, str]], tmp_path: Path, images: list[Path]
) -> None:
    checkpoint = saved(trained)
    form = ImageForm(separator="", questions=7, counted=8)
    assert find_images(trained, checkpoint) == form == find_lineage(trained, checkpoint).images
    assert prompts_of(trained) == [f"<image>{QUESTION}", f"<image> {QUESTION}"], "in the evaluation of the run itself"
    again, _ = run("again", stage("evaluate", checkpoint), evaluation=trained.data.evaluation)
    assert prompts_of(again) == prompts_of(trained)
    given = [
        {"prompt": QUESTION},
        *({"prompt": f"{joined}{QUESTION}"} for joined in ("<image>", "<image>\n")),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}]},
    ]
    asked = [{**row, "images": [str(images[0])]} for row in given]
    (tmp_path / "ask.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked), encoding="utf-8")
    wanted = Inference(input=str(tmp_path / "ask.jsonl"), batch=4, sampling=Sampling(max_new_tokens=8))
    spec, text = run("infer", stage("infer", checkpoint, inference=wanted))
    assert text.count("images are put before the question, followed by nothing, as in 7 of 8 training questions") == 1
    unmarked, joined, line_feed, parts = [
        {key: row[key] for key in ("answer", "prompt_tokens")} for row in read_lines(Path(spec.output) / "answers.jsonl")
    ]
    assert unmarked == joined == parts and line_feed["prompt_tokens"] == joined["prompt_tokens"] + 1
    assert describe_state(spec, find_lineage(spec, checkpoint)).images == form, "and so does what is merged, converted or quantized"


@pytest.mark.slow
def test_a_chat_is_asked_as_the_training_rows_were(
    trained: TrainSpec, run: Callable[..., tuple[TrainSpec, str]], tmp_path: Path, images: list[Path]
) -> None:
    from openai import OpenAI

    wanted = Inference(prompt=QUESTION, image=str(images[0]), sampling=Sampling(max_new_tokens=8))
    one, _ = run("infer", stage("infer", saved(trained), inference=wanted))
    (row,) = read_lines(Path(one.output) / "answers.jsonl")
    options = Serving(port=0, sampling=Sampling(max_new_tokens=8))
    text: Any = {"type": "text", "text": QUESTION}
    image: Any = {"type": "image_url", "image_url": {"url": data_uri(images[0].read_bytes())}}
    with (
        served(replace(trained, stage=stage("serve", saved(trained), serving=options)), tmp_path / "served") as (_, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        for content in ([image, text], [text, image]):
            found = client.chat.completions.create(model="tiny_llava", messages=[{"role": "user", "content": content}])
            assert (found.choices[0].message.content.strip(), found.usage.prompt_tokens) == (row["answer"], row["prompt_tokens"])
        said = json.loads((tmp_path / "served" / "serving.json").read_text())["images"]
        assert said == "images are put before the question, followed by nothing, as in 7 of 8 training questions"


def test_a_stage_whose_rows_say_nothing_keeps_the_form_that_it_began_with(
    trained: TrainSpec, run: Callable[..., tuple[TrainSpec, str]], tmp_path: Path, images: list[Path]
) -> None:
    rows = write_rows(tmp_path / "within.json", [f"Which digit is <image> this {n}?" for n in range(8)], images)
    begun = replace(FULL, name="lora", trainable=(), lora=LORA, checkpoint=str(saved(trained)))
    later, _ = run("later", begun, train=str(rows))
    assert find_images(later, saved(later)) == ImageForm(separator="", questions=7, counted=8)


def test_checkpoints_without_a_record_are_asked_as_before(trained: TrainSpec) -> None:
    """An older version's have a line feed; of weights that were trained elsewhere, the template of their owner decides."""
    checkpoint = saved(trained)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["images"]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    assert find_images(trained, checkpoint) == find_lineage(trained, checkpoint).images == LINE_FEED
    (checkpoint / STATE_FILE).unlink()
    assert find_images(trained, None) == find_images(trained, checkpoint) == LINE_FEED
    for family, separator in (("internvl", "\n"), ("minicpm_v_2_6", "\n"), ("qwen2_5_vl", ""), ("qwen2_5_omni", "")):
        published = replace(trained, model=replace(trained.model, family=family))
        assert find_images(published, checkpoint) == ImageForm(separator=separator)
