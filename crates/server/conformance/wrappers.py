#!/usr/bin/env python3
"""Asks a running server through litellm and langchain: wrappers.py URL MODEL. Versions: requirements.txt."""
import os
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a price list
import litellm
from langchain_openai import ChatOpenAI

BASE, MODEL = sys.argv[1].rstrip("/") + "/v1", sys.argv[2]
ASK = [{"role": "user", "content": "Say hello."}]
results = []


def check(work):
    try:
        assert work(), "an empty answer"
        results.append(True)
        print(f"ok   {work.__name__}")
    except Exception as error:  # every failure of a client is a finding
        results.append(False)
        print(f"FAIL {work.__name__}: {type(error).__name__}: {str(error)[:300]}")


def complete(provider, **more):
    return litellm.completion(
        model=f"{provider}/{MODEL}", api_base=BASE, api_key="none", messages=ASK, max_tokens=12, **more)


@check
def litellm_openai():
    return complete("openai").choices[0].message.content


@check
def litellm_hosted_vllm():
    return complete("hosted_vllm").choices[0].message.content


@check
def litellm_stream():
    return "".join(chunk.choices[0].delta.content or "" for chunk in complete("openai", stream=True))


chain = ChatOpenAI(model=MODEL, base_url=BASE, api_key="none", max_tokens=12)


@check
def langchain_invoke():
    return chain.invoke("Say hello.").content


@check
def langchain_stream():
    return "".join(piece.content for piece in chain.stream("Say hello."))


failed = results.count(False)
print(f"{len(results) - failed} passed, {failed} failed")
sys.exit(1 if failed else 0)
