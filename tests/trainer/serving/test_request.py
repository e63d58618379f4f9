"""Every key of a request is used, has no effect, or is refused by its name."""

import json
from typing import Any

import pytest

from trainer.contract import LINE_FEED, ImageForm, Sampling
from trainer.serving.body import MOST_DELIMITERS, parse_body
from trainer.serving.refusal import RequestRefused
from trainer.serving.request import READ, WITHOUT_EFFECT, ChatRequest, read_request

DEFAULT = Sampling(max_new_tokens=100, temperature=0.5, top_p=0.9, top_k=7)
HELLO = [{"role": "user", "content": "Hello"}]
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "what?"}


def read(**keys: Any) -> ChatRequest:
    return read_request({"model": "m", "messages": HELLO, **keys}, "m", DEFAULT, most_images=2, most_characters=1000)


def refusal_of(**keys: Any) -> RequestRefused:
    with pytest.raises(RequestRefused) as refused:
        read(**keys)
    return refused.value


def test_missing_keys_get_the_defaults_of_the_server() -> None:
    asked = read()
    assert (asked.sampling, asked.seed, asked.stop, asked.stream, asked.usage) == (DEFAULT, None, (), False, False)
    assert read(**dict.fromkeys((*(READ - {"model", "messages"}), *WITHOUT_EFFECT))) == asked


def test_given_values_are_used() -> None:
    asked = read(
        max_tokens=5, temperature=0, top_p=1, top_k=0, seed=-3, stop=["a", "b"], stream=True, stream_options={"include_usage": True}
    )
    assert asked.sampling == Sampling(max_new_tokens=5, temperature=0.0, top_p=1.0, top_k=0)
    assert (asked.seed, asked.stop, asked.stream, asked.usage) == (-3, ("a", "b"), True, True)
    assert read(max_completion_tokens=6).sampling.max_new_tokens == 6 and read(stop="x").stop == ("x",)


def test_unsupported_keys_are_accepted_with_a_value_that_requests_nothing() -> None:
    asked = read()
    for key, values in WITHOUT_EFFECT.items():
        assert all(read(**{key: value}) == asked for value in values), key
    assert read(user="me", safety_identifier="me", prompt_cache_key="k") == asked


@pytest.mark.parametrize(
    ("keys", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"presence_penalty": -1}, "presence_penalty", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "unknown_parameter"),
        ({"best_of": 2}, "best_of", "unknown_parameter"),
        ({"\ud800": 2}, "\\ud800", "unknown_parameter"),
        ({"user": 5}, "user", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
        ({"model": None}, "model", "invalid_value"),
        ({"model": ["m"]}, "model", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 101}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5.0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**400}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": "1"}, "seed", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ["", "a"]}, "stop", "invalid_value"),
        ({"stop": ["a" * 201]}, "stop", "invalid_value"),
        ({"stop": ["a", 5]}, "stop[1]", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_value"),
    ],
)
def test_no_value_that_would_change_an_answer_is_ignored(keys: dict[str, Any], param: str, code: str) -> None:
    refusal = refusal_of(**keys)
    assert (refusal.param, refusal.code, refusal.status) == (param, code, 404 if code == "model_not_found" else 400)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ({}, "messages"),
        (["hello"], "messages[0]"),
        (HELLO * 65, "messages"),
        (HELLO * 2, "messages"),
        ([{"role": "system", "content": "s"}], "messages"),
        ([*HELLO, {"role": "assistant", "content": "a"}], "messages"),
        ([*HELLO, {"role": "system", "content": "a"}, *HELLO], "messages"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": " \n"}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0]"),
        ([{"role": "user", "content": "\udc00"}], "messages[0].content"),
        ([{"role": "user", "content": "see <image>"}], "messages[0].content"),
        ([{"role": "user", "content": "x" * 1001}], "messages"),
        ([user("text")], "messages[0].content[0]"),
        ([user({"type": "input_audio"})], "messages[0].content[0].type"),
        ([user({"type": "text"})], "messages[0].content[0].text"),
        ([user({"type": "text", "text": "<image>"})], "messages[0].content[0].text"),
        ([user({"type": "image_url"})], "messages[0].content[0].image_url"),
        ([user({"type": "image_url", "image_url": "data:"})], "messages[0].content[0].image_url"),
        ([user({"type": "image_url", "image_url": {}})], "messages[0].content[0].image_url.url"),
        ([user({"type": "image_url", "image_url": {"url": 5}})], "messages[0].content[0].image_url.url"),
        ([user({"type": "image_url", "image_url": {"url": "u", "detail": "low"}})], "messages[0].content[0].image_url.detail"),
        ([user({"type": "image_url", "image_url": {"url": "u", "max_pixels": 9}})], "messages[0].content[0].image_url"),
        ([user(URL, URL, URL)], "messages"),
        ([{"role": "system", "content": [URL]}, *HELLO], "messages[0].content[0]"),
        ([*HELLO, {"role": "assistant", "content": [URL]}, *HELLO], "messages[1].content[0]"),
    ],
)
def test_invalid_messages(messages: Any, param: str) -> None:
    assert refusal_of(messages=messages).param == param


def test_valid_messages() -> None:
    asked = read(
        messages=[
            {"role": "developer", "content": "be brief", "name": "d"},
            user(URL, TEXT),
            {"role": "assistant", "content": "a"},
            user(TEXT, TEXT),
        ]
    )
    assert [(message.role, message.content) for message in asked.messages] == [
        ("system", "be brief"), ("user", "<image>\nwhat?"), ("assistant", "a"), ("user", "what?what?"),
    ]  # fmt: skip
    assert asked.images == ("data:image/png;base64,AAAA",)
    assert read(messages=[user(TEXT, URL, URL, TEXT)]).messages[0].content == "what?<image><image>\nwhat?"
    assert read(messages=[user(URL, {"type": "text", "text": "\nwhat?"})]).messages[0].content == "<image>\nwhat?"


@pytest.mark.parametrize(
    ("form", "before", "after", "many"),
    [
        (LINE_FEED, "<image>\nwhat?", "what?<image>", "<image><image>\nwhat?"),
        (ImageForm(separator=""), "<image>what?", "what?<image>", "<image><image>what?"),
        (ImageForm(questions=3, counted=3), "<image>\nwhat?", "<image>\nwhat?", "<image><image>\nwhat?"),
        (ImageForm(separator="", questions=3, counted=3), "<image>what?", "<image>what?", "<image><image>what?"),
        (
            ImageForm(place="after", separator=" ", between=" ", questions=3, counted=4),
            "what? <image>",
            "what? <image>",
            "what? <image> <image>",
        ),
    ],
)
def test_images_stand_where_the_training_rows_had_them(form: ImageForm, before: str, after: str, many: str) -> None:
    """An unknown form leaves the order to the client, as published weights do."""

    def text_of(*parts: Any) -> str:
        return read_request({"model": "m", "messages": [user(*parts)]}, "m", DEFAULT, 4, 1000, form).messages[0].content

    assert (text_of(URL, TEXT), text_of(TEXT, URL), text_of(URL, URL, TEXT)) == (before, after, many)
    assert text_of(TEXT, URL, TEXT).startswith("what?<image>"), "one within the question stays there"
    assert text_of(URL) == "<image>" and text_of(TEXT) == "what?"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": Infinity}', "invalid_json"),
        (b'{"a": 1, "a": 2}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}", "too_deep"),
        (b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "too_deep"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "too_deep"),
        (b"[" + b"[]," * MOST_DELIMITERS + b"]", "too_many_values"),
    ],
)
def test_invalid_bodies(body: bytes, code: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_body(body)
    assert refused.value.code == code


def test_a_valid_body() -> None:
    assert parse_body(json.dumps({"a": [1, {"b": "é\u2028"}]}).encode()) == {"a": [1, {"b": "é\u2028"}]}
