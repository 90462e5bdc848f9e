"""llama.cpp in this process, asked over HTTP: tokens, templates, greedy continuations with their probabilities."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

from distill.data.teacher.local import server_params, start_server


class LlamaCpp:
    """A GGUF file, served; keys and values are kept in fp32, so that fp32 weights give fp32 arithmetic."""

    def __init__(self, path: Path, context: int = 1024) -> None:
        params = server_params(path, slots=1, context=context)
        params.use_jinja, params.cache_prompt, params.warmup = True, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # computes in fp16
        self._server = start_server(params)
        self._url = self._server.listening_address

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Ids, control tokens parsed."""
        return self._post("/tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """The prompt that a chat request becomes."""
        body: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
        return self._post("/apply-template", body)["prompt"]

    def greedy(self, ids: list[int], n: int) -> tuple[list[int], dict[int, dict[int, float]]]:
        """Greedy continuation and, by step, the log-probabilities of the best ten. The server gives none for a token
        that ends inside a character."""
        found = self._post(
            "/completion",
            {"prompt": ids, "n_predict": n, "temperature": 0.0, "n_probs": 10, "return_tokens": True,
             "cache_prompt": False},
        )  # fmt: skip
        tokens, steps, at = found["tokens"], {}, 0
        for given in found.get("completion_probabilities", []):
            while at < len(tokens) and tokens[at] != given["id"]:
                at += 1
            steps[at] = {best["id"]: best["logprob"] for best in given["top_logprobs"]}
            at += 1
        return tokens, steps
