"""Whether an answer is in the loss: the keys of a message under which data sets say it."""

from typing import Any

from trainer.data.rows.parsed_row import AddProblem, Role, Row, kind

# loss: modelscope/ms-swift (docs/source_en/Customization/Custom-dataset.md), InternLM/xtuner (xtuner/v1/data_proto/messages/chat.py),
# THUDM/AgentInstruct (true or null). train, training: axolotl's message_field_training, its usual values. trainable, learnable: the same elsewhere.
SWITCHES = ("loss", "train", "training", "trainable", "learnable")
# weight: OpenAI's fine-tuning and mistral-finetune, 0 or 1. loss_weight: hiyouga/LLaMA-Factory (src/llamafactory/v1/plugins/data_plugins/
# converter.py). loss_scale: ms-swift since 4.2, beside --loss_scale.
WEIGHTS = ("weight", "loss_weight", "loss_scale")
EXCLUDING = ("no_train", "masked", "mask_loss")  # true: not in the loss
FLAGS = frozenset((*SWITCHES, *WEIGHTS, *EXCLUDING))
FIX = "set it to false to exclude an answer from the loss, or remove the key"


def read_loss(item: Row, role: Role, field: str, add_problem: AddProblem) -> bool | None:
    """Whether a message is in the loss if it is an answer; true without any of the keys. None, with a problem, for other values, for keys that
    disagree, and for a message of another role that should be in the loss."""
    given: dict[str, bool] = {}
    for key in item:
        if key not in FLAGS or item[key] is None:
            continue
        found = read_flag(key, item[key])
        if isinstance(found, str):
            add_problem(
                f"{field}.{key}", found, FIX if key in SWITCHES else f'remove it, and write "loss": false in {field} to exclude an answer'
            )
            return None
        if found and role != "assistant" and key not in EXCLUDING:
            add_problem(f"{field}.{key}", "only answers can be in the loss", FIX if key in SWITCHES else "remove the key, or set it to 0")
            return None
        given[key] = found
    if len(set(given.values())) > 1:
        add_problem(field, f"{' and '.join(given)} say different things about the loss", 'keep one of them: "loss": true or false')
        return None
    return next(iter(given.values()), True)


def read_flag(key: str, value: Any) -> bool | str:
    """Or what is wrong with the value."""
    if key in WEIGHTS:
        if not isinstance(value, bool | int | float):
            return f"is {kind(value)}, not 0 or 1"
        return (
            bool(value) if value in (0, 1) else f"is {value}: an answer is in the loss or not (1 or 0), weights between are not supported"
        )
    if value in (0, 1) and (isinstance(value, bool) or (key != "loss" and isinstance(value, int))):
        return bool(value) != (key in EXCLUDING)
    return f"is {kind(value)}, not true or false"
