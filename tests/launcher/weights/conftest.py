"""A small checkpoint in the published form of Qwen2.5-VL, and a hub that serves it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.weights.hub_server import Hub, serve

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14}
CONFIG = {
    **{
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
    },
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "vision_config": VISION,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, begin = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(content)]}
        begin += len(content)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in tensors.values())


def published_files() -> dict[str, bytes]:
    """The files of a repository, with those that are not needed: pickled duplicates, code, a subfolder, weights for another library."""
    shards = {
        SHARDS[0]: safetensors({"model.embed_tokens.weight": ("BF16", [100, 40], bytes(range(200)) * 40)}),
        SHARDS[1]: safetensors(
            {"visual.merger.weight": ("BF16", [50, 20], b"\x01\x02" * 1000), "lm_head.weight": ("BF16", [100, 40], b"\x03" * 8000)}
        ),
    }
    index = {
        "metadata": {"total_size": 18000},
        "weight_map": {"model.embed_tokens.weight": SHARDS[0], "visual.merger.weight": SHARDS[1], "lm_head.weight": SHARDS[1]},
    }
    return {
        **{".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# Qwen2.5-VL\n", "LICENSE": b"Apache-2.0\n"},
        **{"config.json": json.dumps(CONFIG, indent=2).encode(), "generation_config.json": b"{}\n"},
        **{
            "tokenizer.json": b"{}\n",
            "tokenizer_config.json": b"{}\n",
            "preprocessor_config.json": b"{}\n",
            "chat_template.jinja": b"{{ x }}",
        },
        **{"model.safetensors.index.json": json.dumps(index).encode(), **shards},
        **{"consolidated.safetensors": b"\0" * 500, "pytorch_model-00001-of-00001.bin": b"\0" * 500, "pytorch_model.bin.index.json": b"{}"},
        **{"modeling_qwen.py": b"raise SystemExit\n", "assets/icon.json": b"{}", "empty.txt": b""},
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub(files=published_files())
    with serve(found) as address:
        found.address = address
        yield found


@pytest.fixture
def storage(hub: Hub) -> Iterator[Hub]:
    """The host that files of the hub are redirected to."""
    found = Hub(files=hub.files)
    with serve(found) as address:
        found.address = hub.storage = address
        yield found


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, content in published_files().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return folder
