#!/usr/bin/env python3
"""Asks a running server through the official Python SDKs. Versions: requirements.txt beside this file.

    python3 -m venv /tmp/clients && /tmp/clients/bin/pip install -r crates/server/conformance/requirements.txt
    /tmp/clients/bin/python crates/server/conformance/clients.py http://127.0.0.1:8000

Every check prints a line; the last line is `N passed, N failed`, and the exit status says the same.
"""
import sys

import anthropic
import openai

BASE = sys.argv[1].rstrip("/")
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"
ASK = [{"role": "user", "content": "Say hello."}]
TOOL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
results = []


def check(work):
    try:
        work()
        results.append(True)
        print(f"ok   {work.__name__}")
    except Exception as error:  # every failure of a client is a finding
        results.append(False)
        print(f"FAIL {work.__name__}: {type(error).__name__}: {str(error)[:300]}")


client = openai.OpenAI(base_url=f"{BASE}/v1", api_key=KEY, max_retries=0)
MODEL = client.models.list().data[0].id
claude = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0)


@check
def openai_chat():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=12, seed=1)
    assert answer.usage.completion_tokens >= 1 and answer.choices[0].finish_reason in ("stop", "length")


@check
def openai_chat_stream():
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, max_completion_tokens=12, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens >= 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@check
def openai_stream_left_early():
    with client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=400, stream=True) as stream:
        next(iter(stream))


@check
def openai_completion_logprobs():
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=2, logprobs=1, echo=True)
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)


@check
def openai_json_schema():
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, max_completion_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}})
    import json
    assert json.loads(answer.choices[0].message.content)["a"] in ("x", "y")


@check
def openai_required_tool():
    tool = {"type": "function", "function": {"name": "weather", "parameters": TOOL}}
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_completion_tokens=200)
    assert answer.choices[0].finish_reason in ("tool_calls", "length")


@check
def openai_responses():
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    assert answer.output_text is not None and answer.usage.output_tokens >= 1


@check
def openai_responses_stream():
    events = list(client.responses.create(model=MODEL, input=ASK, max_output_tokens=16, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


@check
def openai_bad_request_is_refused():
    try:
        client.chat.completions.create(model=MODEL, messages=ASK, n=99)
    except openai.BadRequestError as error:
        assert error.param == "n", error.param
    else:
        raise AssertionError("n=99 was taken")


@check
def anthropic_message():
    answer = claude.messages.create(model=MODEL, max_tokens=12, messages=ASK)
    assert answer.content[0].type == "text" and answer.usage.output_tokens >= 1


@check
def anthropic_stream():
    with claude.messages.stream(model=MODEL, max_tokens=12, messages=ASK, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text and final.stop_reason in ("end_turn", "max_tokens")


@check
def anthropic_count_tokens():
    assert claude.messages.count_tokens(model=MODEL, messages=ASK).input_tokens > 3


@check
def anthropic_tool():
    tool = {"name": "weather", "description": "the weather", "input_schema": TOOL}
    answer = claude.messages.create(
        model=MODEL, max_tokens=200, messages=ASK, tools=[tool],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
    assert answer.stop_reason in ("tool_use", "max_tokens")


failed = results.count(False)
print(f"{len(results) - failed} passed, {failed} failed")
sys.exit(1 if failed else 0)
