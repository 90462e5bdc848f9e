"""An Ollama Modelfile: the student's chat template in Go's template language, its stop tokens and its context.

Form after docs/modelfile.mdx and docs/template.mdx of ollama/ollama; `if .ToolCalls` around the calls is where Ollama
looks for the mark that opens one. Its `json` writes no space after `:` and `,`, sorts keys and escapes <, > and &, so a
tool's schema reaches the student in another spelling than in training; the calls of earlier turns do where an argument
is a list or an object, or holds such a character.
"""

from __future__ import annotations

from distill.chat import THINK_END, THINK_START, TOOLS_HEAD, TOOLS_TAIL
from distill.tokenizer import CALL_END, CALL_START, TURN_END, TURN_START, Tokenizer

TEMPLATE = (
    "{{ if .Tools }}" + TURN_START + "system\n{{ if .System }}{{ .System }}\n\n{{ end }}" + TOOLS_HEAD
    + "{{ range $i, $tool := .Tools }}{{ if $i }}\n{{ end }}{{ json .Function }}{{ end }}"
    + TOOLS_TAIL + TURN_END + "\n{{ end }}"
    + '{{ range $i, $message := .Messages }}{{ if not (and $.Tools (eq $i 0) (eq .Role "system")) }}'
    + TURN_START + "{{ .Role }}\n"
    + "{{ if .Thinking }}" + THINK_START + "{{ .Thinking }}" + THINK_END + "{{ end }}{{ .Content }}"
    + "{{ if .ToolCalls }}{{ range .ToolCalls }}" + CALL_START
    + '{"name": {{ json .Function.Name }}, "arguments": {{ "{" }}{{ $more := false }}'
    + "{{ range $key, $value := .Function.Arguments }}{{ if $more }}, {{ end }}{{ $more = true }}"
    + "{{ json $key }}: {{ json $value }}{{ end }}}}" + CALL_END + "{{ end }}{{ end }}"
    + TURN_END + "\n{{ end }}{{ end }}" + TURN_START + "assistant\n"
)  # fmt: skip


def modelfile(weights: str, tokenizer: Tokenizer, context: int) -> str:
    """The text of a Modelfile beside the GGUF file `weights`. Greedy, as everything here is measured."""
    stops = sorted({tokenizer.decode([identity]) for identity in tokenizer.stop_ids})
    parameters = [f'PARAMETER stop "{stop}"' for stop in stops] + [
        f"PARAMETER num_ctx {context}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join([f"FROM ./{weights}", f'TEMPLATE """{TEMPLATE}"""', *parameters]) + "\n"
