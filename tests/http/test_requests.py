"""What a request may say: every value out of bounds is a 400 that names its field."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from reft_runtime.text import ChatOptions
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine

HUGE = 2**63


def each(field: str, *values: Any) -> list[tuple[str, Any]]:
    """Cases of one field."""
    return [(field, value) for value in values]


# Values that no generating route takes, by field.
SAMPLING: list[tuple[str, Any]] = [
    *each("temperature", -1, -0.01, 2.01, 1e308, "0", True, [], {}, 10**400),
    *each("top_p", 0, -1, 1.01, "1", False),
    *each("top_k", -2, HUGE, 1.5, "5", True),
    *each("min_p", -0.1, 1.1, "x"),
    *each("n", 0, -1, 129, 1_000_000, HUGE, 1.5, "1", True),
    *each("stream", 1, "true", 0, []),
    *each("stop", "", [""], ["a"] * 129, ["a"] * 10_000, [1], 5, "x" * 1025, {}),
    *each("stop_token_ids", [-1], ["a"], [1.5], [0] * 129, 3, [HUGE]),
    *each("seed", HUGE, -HUGE - 1, 1.5, "1", True),
    *each("presence_penalty", -2.1, 2.1, "1"),
    *each("frequency_penalty", -2.1, 2.1, "1"),
    *each("repetition_penalty", 0, -1, 101, "1"),
    *each("logit_bias", {"a": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, [], {"9" * 30: 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    *each("min_tokens", -1, HUGE, 5, 1.5),
    *each("ignore_eos", 1, "true"),
    *each("model", "", None, 5, "x" * 513, []),
    *each("interventions", "emoji", [{"name": "emoji"}] * 17, {}, [5], ["emoji"]),
    *each("store", True, 1, 0, 0.0),
    *each("add_special_tokens", 1, 1.0),
    *each("user", 5, []),
    *each("metadata", "x", []),
    ("stream_options", {"include_usage": True}),
    *each("prompt_logprobs", -1, 21, True, "1", 1.5),
    *each("skip_special_tokens", 1, "true"),
    *each("include_stop_str_in_output", 1),
    *each("return_token_ids", 1),
    *each("priority", "1", 1.5, True, HUGE),
    *each("best_of", 2, 0, -1, 1_000_000, "1"),
    *each("use_beam_search", True, 1),
    *each("length_penalty", 0.5, 2, "1"),
    *each("bad_words", ["x"], "x"),
    *each("early_stopping", True),
    *each("spaces_between_special_tokens", False),
    *each("return_tokens_as_token_ids", True),
    ("nonsense", 1),
    *((name, "x") for name in ("chat_template", "truncate_prompt_tokens")),
    *each("response_format", "text", 5, [], {}, {"type": "xml"}, {"type": 1}),
    *each("structured_outputs", {}, {"regex": "a", "choice": ["b"]}, {"json_object": False}),
    *each("guided_json", 1, [], "", True),
    *each("guided_regex", 1, "", []),
    *each("guided_choice", [], "x", {}),
    *each("guided_grammar", 1, ""),
]
COMPLETION: list[tuple[str, Any]] = [
    *each("max_tokens", -1, HUGE, 1.5, "5", True, 0, 99),
    *each("prompt", None, 5, [], {}, [[]], [1.5], [None], True, [-1], [HUGE], [256]),
    *each("prompt", [1, "a"], ["a", 1], [[1], "a"], [["a"]], ["a"] * 129, "", [True]),
    ("prompt", "x" * 100),
    ("prompt", [1] * 100),
    *each("logprobs", -1, 21, True, "1"),
    *each("echo", 1, "true"),
    *each("add_special_tokens", False),
    ("suffix", "x"),
    ("messages", []),
]
CHAT: list[tuple[str, Any]] = [
    *each("max_tokens", -1, 0, HUGE, 1.5, "5"),
    *each("max_completion_tokens", -1, 0, HUGE),
    *each("messages", None, [], {}, "Hi", [5]),
    *each("logprobs", 1, 5, "true"),
    *each("top_logprobs", -1, 21, 5),
    *each("tools", [{"type": "function"}], "x"),
    *each("tool_choice", "any", {"type": "function"}, {"type": "allowed_tools"}),
    *each("functions", [{"name": "f"}]),
    *each("prompt", "x"),
    *each("chat_template_kwargs", {"a": 1}),
    *each("documents", []),
    *each("reasoning_effort", "huge", 5, True),
    *each("chat_template_kwargs", [], "x", {"enable_thinking": [1]}, {"x" * 65: 1}),
    *each("chat_template_kwargs", {"enable_thinking": "x" * 257}, {str(i): 1 for i in range(17)}),
    *each("chat_template_kwargs", {"chat_template": "x"}, {"tokenize": False}),
    *each("add_generation_prompt", 1, "true"),
    *each("continue_final_message", 1, "true"),
    *each("audio", {"voice": "x"}),
    *each("echo", True),
    *each("add_special_tokens", True),
]
NESTED: list[tuple[str, Any]] = [
    ("interventions.0.name", {"interventions": [{}]}),
    ("interventions.0.strength", {"interventions": [{"name": "emoji", "strength": 101}]}),
    ("interventions.0.strength", {"interventions": [{"name": "emoji", "strength": "1"}]}),
    ("interventions.1.scale", {"interventions": [{"name": "emoji"}, {"name": "x", "scale": 1}]}),
    ("messages.0.role", {"messages": [{"content": "x"}]}),
    ("messages.0.role", {"messages": [{"role": "function", "content": "x"}]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": None}]}),
    ("messages.0.content", {"messages": [{"role": "system"}]}),
    ("messages.0.content", {"messages": [{"role": "assistant", "content": 5}]}),
    ("messages.0.name", {"messages": [{"role": "user", "content": "x", "name": 5}]}),
    ("messages.0.name", {"messages": [{"role": "user", "content": "x", "name": "y" * 257}]}),
    ("chat_template_kwargs.a", {"chat_template_kwargs": {"a": 1}}),
    (
        "messages.0.content.0.type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
    ),
    ("messages.0.tool_calls.0", {"messages": [{"role": "user", "content": "", "tool_calls": [1]}]}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    (
        "response_format.json_schema.name",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    ),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
    ),
    ("response_format.json", {"response_format": {"type": "json_object", "json": {}}}),
    ("structured_outputs.json", {"structured_outputs": {"json": 5}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
    ("structured_outputs.choice.1", {"structured_outputs": {"choice": ["a", ""]}}),
    ("guided_json", {"guided_json": {}, "structured_outputs": {"regex": "a"}}),
    ("guided_choice", {"guided_regex": "a", "guided_choice": ["a"]}),
    ("stream_options.x", {"stream": True, "stream_options": {"x": 1}}),
]

NOTHING_OF_VLLM = {
    "use_beam_search": False,
    "early_stopping": False,
    "length_penalty": 1,
    "spaces_between_special_tokens": True,
    "return_tokens_as_token_ids": False,
    "bad_words": [],
}


def assert_refused(response: httpx.Response, param: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    assert error["param"] == param or error["param"].startswith(f"{param}.")
    assert len(error["message"]) > len(param)


@pytest.mark.parametrize(("field", "value"), SAMPLING + COMPLETION)
async def test_bad_completion(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, value: Any
) -> None:
    response = await client.post("/v1/completions", json=completion(**{field: value}))
    assert_refused(response, field)
    assert len(engine.streams) == 1  # the canary's


@pytest.mark.parametrize(("field", "value"), SAMPLING + CHAT)
async def test_bad_chat(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, value: Any
) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**{field: value}))
    assert_refused(response, field)
    assert len(engine.streams) == 1


@pytest.mark.parametrize(("param", "fields"), NESTED)
async def test_bad_nested_field(
    client: httpx.AsyncClient, param: str, fields: dict[str, Any]
) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert_refused(response, param)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1, "suffix": ""},
        {"stream_options": None, "stop": None, "logit_bias": None, "seed": None},
        {"n": None, "temperature": None, "logprobs": None, "echo": None, "best_of": None},
        {"stop": []},
        {"nonsense": None},
        {"prompt": "", "echo": True} | {"prompt": "x"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ],
)
async def test_what_has_no_effect_is_accepted(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    ordinary = {
        "user": "me",
        "metadata": {"a": 1},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "prompt_cache_retention": "24h",
        "add_special_tokens": True,
        **NOTHING_OF_VLLM,
    }
    response = await client.post("/v1/completions", json=completion(**ordinary, **fields))
    assert response.status_code == 200, response.text


async def test_what_has_no_effect_in_a_chat_is_accepted(client: httpx.AsyncClient) -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "audio": None,
        "annotations": [],
    }
    fields = {
        "messages": [{"role": "user", "content": "x"}, answer, {"role": "user", "content": "y"}],
        "tools": [],
        "functions": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logprobs": False,
        "top_logprobs": 0,
        "verbosity": "medium",
        "reasoning_effort": "max",
        "prompt_cache_retention": "in_memory",
        "best_of": 1,
        "echo": False,
        "add_special_tokens": False,
        **NOTHING_OF_VLLM,
    }
    response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text


async def test_a_litellm_conversation_is_accepted(client: httpx.AsyncClient) -> None:
    """The body that LiteLLM sends when its earlier answer is part of the messages."""
    earlier: dict[str, Any] = {"content": "Hello!", "role": "assistant"}
    earlier["provider_specific_fields"] = {"refusal": None}
    user = {"role": "user", "content": "Hi"}
    body = {"messages": [user, earlier, user], "model": "tiny", "max_tokens": 4}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    earlier["provider_specific_fields"] = {"thinking": "x"}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    param = response.json()["error"]["param"]
    assert param == "messages.1.provider_specific_fields.thinking"


async def test_a_conversation_of_the_javascript_agents_is_accepted(
    client: httpx.AsyncClient,
) -> None:
    """The body that @openai/agents sends: a part holds what else the earlier message had."""
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    part: dict[str, Any] = {"type": "text", "text": "Hello!", "role": "assistant"}
    part |= {"refusal": None, "reasoning_content": "Greet.", "tool_calls": [call]}
    part |= {"annotations": []}
    user = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    earlier = {"role": "assistant", "content": [part], "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "x"}
    body: dict[str, Any] = {"messages": [user, earlier, result, user], "model": "tiny"}
    response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 4})
    assert response.status_code == 200, response.text
    part["role"] = "user"
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.1.content.0.role"


async def test_a_langchain_conversation_is_accepted(client: httpx.AsyncClient) -> None:
    """The body that ChatOpenAI sends, an earlier answer among the messages."""
    messages = [
        {"content": "x", "role": "system"},
        {"content": "Hi", "role": "user"},
        {"content": "Hello!", "role": "assistant"},
        {"content": [{"type": "text", "text": "More"}], "role": "user"},
    ]
    body = {"messages": messages, "model": "tiny", "max_completion_tokens": 4, "stream": False}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("param", "fields", "message"),
    [
        ("tools.0.type", {"tools": [{"type": "custom"}]}, "this server calls functions only, "),
        ("functions", {"functions": [{}]}, 'functions are taken only with function_call: "none"'),
        (
            "tool_choice.type",
            {"tool_choice": {"type": "allowed_tools"}},
            "functions only; name one, or say required.",
        ),
        ("verbosity", {"verbosity": "low"}, "ask for a short or a long answer in a message."),
        (
            "stream_options.include_obfuscation",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "events are not padded; leave it out.",
        ),
        ("nonsense", {"nonsense": 1}, "nonsense is not supported by this server; leave it out."),
        ("chat_template", {"chat_template": "x"}, "is never taken; lay the prompt out for"),
        (
            "structured_outputs.structural_tag",
            {"structured_outputs": {"structural_tag": "x"}},
            "write the whole form as a grammar in Lark's notation.",
        ),
        (
            "response_format",
            {"response_format": {"type": "xml"}},
            'response_format: give {"type": "text"}, {"type": "json_object"}, or {"type": "json_s',
        ),
        (
            "messages.0.role",
            {"messages": [{"role": "function", "content": "x"}]},
            "give the result of a function as a turn of the role tool.",
        ),
        (
            "messages.0.function_call",
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "give it as tool_calls.",
        ),
        ("stop", {"stop": 5}, "stop: give a string, or a list of up to 128 strings."),
        ("stop", {"stop": {}}, "stop: give a string, or a list of up to 128 strings."),
        ("stop", {"stop": ["x"] * 129}, "stop: list should have at most 128 items, not 129."),
        ("stop.1", {"stop": ["x", 5]}, "stop.1: input should be a valid string."),
        (
            "messages.0.content",
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: give a text, or a list of text parts.",
        ),
        (
            "messages.0.content",
            {"messages": [{"role": "user"}]},
            "messages.0.content: field required.",
        ),
        (
            "chat_template_kwargs.enable_thinking",
            {"chat_template_kwargs": {"enable_thinking": [1]}},
            "give a text of up to 256 characters, a number, true or false.",
        ),
        (
            "logit_bias",
            {"logit_bias": {"a": 1, "7": 1, "-1": 1, "x y": 2}},
            "logit_bias: 'a', '-1', 'x y': no token id.",
        ),
        (
            "logit_bias",
            {"logit_bias": {"1": 101, "7": 1, "2": -101}},
            "logit_bias: the bias of '1', '2' is not between -100 and 100.",
        ),
        (
            "interventions.0",
            {"interventions": ["emoji"]},
            'interventions.0: give an object, such as {"name": ...}.',
        ),
        (
            "messages.0",
            {"messages": ["hi"]},
            'messages.0: give an object, such as {"role": ...}.',
        ),
        (
            "messages.0.content.0",
            {"messages": [{"role": "user", "content": ["hi"]}]},
            'messages.0.content.0: give an object, such as {"type": ..., "text": ...}.',
        ),
        ("stream_options", {"stream": True, "stream_options": "x"}, "options: give an object."),
        ("logit_bias", {"logit_bias": [1]}, "logit_bias: give an object."),
        ("metadata", {"metadata": "x"}, "metadata: give an object."),
    ],
)
async def test_a_refusal_says_what_is_wrong_and_what_to_do(
    client: httpx.AsyncClient, param: str, fields: dict[str, Any], message: str
) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert_refused(response, param)
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]


async def test_messages_do_not_speak_of_validation(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=chat(messages=[]))
    message = "messages: list should have at least 1 item, not 0."
    assert response.json()["error"]["message"] == message
    suffixed = await client.post("/v1/completions", json=completion(suffix="x"))
    message = "suffix is not supported by this server; the prompt is continued at its end only; "
    assert suffixed.json()["error"]["message"] == message + "leave it out."


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 4.0, "n": 1.0, "seed": 7.0, "top_k": 5.0},
        {"stop": ["a"] * 128, "priority": 3, "skip_special_tokens": False},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"messages": [{"role": "user", "content": "x", "name": "ann"}]},
        {"messages": [{"role": "assistant", "content": None}, {"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tool_choice": "auto", "reasoning_effort": "low"},
        {"chat_template_kwargs": {}, "add_generation_prompt": True},
        {"chat_template_kwargs": {"enable_thinking": False}, "continue_final_message": False},
    ],
)
async def test_what_clients_send_is_taken(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text


async def test_a_chats_options_reach_the_template(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.tokenizer.switches = ("enable_thinking", "reasoning_effort")
    fields: dict[str, Any] = {
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    wanted = ChatOptions(
        add_generation_prompt=False,
        continue_final_message=True,
        switches={"enable_thinking": False, "reasoning_effort": "low"},
    )
    await client.post("/v1/chat/completions", json=chat(**fields))
    assert engine.tokenizer.last_options == wanted
    engine.tokenizer.last_options = None
    messages = [{"role": "user", "content": "Hi"}]
    await client.post("/tokenize", json={"messages": messages, **fields})
    assert engine.tokenizer.last_options == wanted


async def test_of_many_unknown_keys_one_is_named(client: httpx.AsyncClient) -> None:
    unknown = {f"k{i}": 1 for i in range(2000)}
    response = await client.post("/v1/chat/completions", json=chat(**unknown))
    assert_refused(response, "k0")
    messages = [{"role": "user", "content": "x", **unknown}]
    response = await client.post("/v1/chat/completions", json=chat(messages=messages))
    assert_refused(response, "messages.0.k0")


async def test_choices_are_bounded_over_all_prompts(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=completion(prompt=["a"] * 65, n=2))
    assert_refused(response, "n")


async def test_two_limits_that_differ(client: httpx.AsyncClient) -> None:
    body = chat(max_tokens=4, max_completion_tokens=5)
    assert_refused(await client.post("/v1/chat/completions", json=body), "max_tokens")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", completion(prompt="x" * 101), "prompt"),
        ("/v1/completions", completion(max_tokens=99), "max_tokens"),
        ("/v1/chat/completions", chat(max_tokens=95), "max_tokens"),
        (
            "/v1/chat/completions",
            chat(messages=[{"role": "user", "content": "x" * 99}], max_tokens=None),
            "messages",
        ),
    ],
)
async def test_too_long(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert_refused(response, param)
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("model", ["nobody", "tiny:nobody", "emoji@1234", "emoji@00000000", "../x"])
async def test_unknown_model(client: httpx.AsyncClient, model: str) -> None:
    response = await client.post("/v1/completions", json=completion(model=model))
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": f"The model `{model}` does not exist.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


async def test_unknown_intervention(client: httpx.AsyncClient) -> None:
    uses = [{"name": "emoji"}, {"name": "nobody"}]
    response = await client.post("/v1/completions", json=completion(interventions=uses))
    assert_refused(response, "interventions.1.name", 404)


async def test_templates_that_differ(client: httpx.AsyncClient) -> None:
    uses = [{"name": "pirate"}, {"name": "formal"}]
    response = await client.post("/v1/chat/completions", json=chat(interventions=uses))
    assert_refused(response, "interventions")


async def test_tokenize(client: httpx.AsyncClient) -> None:
    response = await client.post("/tokenize", json={"prompt": "Hi"})
    assert response.json() == {"tokens": [72, 105], "count": 2, "max_model_len": 100}
    messages = [{"role": "user", "content": "Hi"}]
    response = await client.post("/tokenize", json={"model": "pirate", "messages": messages})
    assert response.json()["count"] == len("Q: Hi A:")
    response = await client.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True})
    assert response.json()["token_strs"] == ["H", "i"]
    response = await client.post("/detokenize", json={"tokens": [72, 105]})
    assert response.json() == {"prompt": "Hi"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "chat_template": "{{ x }}"}, "chat_template"),
        ("/detokenize", {"tokens": [1], "skip_special_tokens": "no"}, "skip_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
async def test_bad_tokenize(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    assert_refused(await client.post(path, json=body), param)
