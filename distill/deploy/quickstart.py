"""QUICKSTART.md: the bundle run from a shell, from Python on macOS and from Swift. A test runs what Linux can run."""

from __future__ import annotations

from typing import Any

from distill.deploy.manifest import Manifest
from distill.tokenizer import TURN_END, TURN_START

QUICKSTART = "QUICKSTART.md"

_PYTHON = '''
import json

import coremltools as ct
import numpy as np
from tokenizers import Tokenizer

runtime = json.load(open("runtime_config.json"))
tokenizer = Tokenizer.from_file(runtime["tokenizer"]["file"])
functions, context = runtime["functions"], runtime["context"]
models = {name: ct.models.MLModel(runtime["package"], function_name=name) for name in functions}
state = models[runtime["decode_function"]].make_state()


def tokens_of(name):
    return functions[name]["tokens"]


def logits_after(ids, position):
    """Feed as many of `ids` as one call takes; how many those were, and the logits after the last of them."""
    inside = sorted((n for n in functions if position + tokens_of(n) <= context), key=tokens_of)
    full = [n for n in inside if tokens_of(n) <= len(ids)]
    if len(ids) > 1 and len(full) == 1 and len(inside) > 1:  # rather one padded chunk than token by token
        full = inside[:2]
    name = full[-1]
    chunk = ids[: tokens_of(name)]
    padded = np.full((1, tokens_of(name)), runtime["tokenizer"]["pad_id"], np.int32)
    padded[0, : len(chunk)] = chunk
    inputs = {"@INPUT@": padded, "@POSITION@": np.array([position], np.int32)}
    return len(chunk), models[name].predict(inputs, state=state)["@OUTPUT@"][0, len(chunk) - 1]


ids = tokenizer.encode("@PROMPT@", add_special_tokens=False).ids
answer, position = [], 0
while len(answer) < 32 and position < context:
    fed, logits = logits_after(ids[position:], position)
    position += fed
    if position < len(ids):
        continue
    token = int(np.argmax(logits))
    if token in runtime["tokenizer"]["stop_ids"]:
        break
    answer.append(token)
    ids.append(token)
print(tokenizer.decode(answer, skip_special_tokens=False))
'''

_SWIFT = """
import CoreML

let compiled = try await MLModel.compileModel(at: URL(fileURLWithPath: "@PACKAGE@"))

func load(_ function: String) throws -> MLModel {
    let configuration = MLModelConfiguration()
    configuration.computeUnits = .all
    configuration.functionName = function
    return try MLModel(contentsOf: compiled, configuration: configuration)
}

let decode = try load("@DECODE@")
let state = decode.makeState()  // one a conversation, and one prediction at a time on it

/// Logits after the token `id` at `position`, counted from 0.
func logits(after id: Int32, at position: Int32) async throws -> [Float16] {
    let inputs = try MLDictionaryFeatureProvider(dictionary: [
        "@INPUT@": MLMultiArray(MLShapedArray<Int32>(scalars: [id], shape: [1, 1])),
        "@POSITION@": MLMultiArray(MLShapedArray<Int32>(scalars: [position], shape: [1])),
    ])
    let outputs = try await decode.prediction(from: inputs, using: state)
    return MLShapedArray<Float16>(outputs.featureValue(for: "@OUTPUT@")!.multiArrayValue!).scalars
}

func answer(_ prompt: [Int32]) async throws -> [Int32] {
    let stops: Set<Int32> = [@STOPS@]
    var ids = prompt, position = 0
    while position < @CONTEXT@ {
        let found = try await logits(after: ids[position], at: Int32(position))
        position += 1
        if position < ids.count { continue }
        let best = Int32(found.indices.max { found[$0] < found[$1] }!)
        if stops.contains(best) { break }
        ids.append(best)
    }
    return Array(ids[prompt.count...])
}
"""

_PAGE = """# @NAME@: quick start

All commands are for the folder of the bundle. `runtime_config.json` says everything that a runner needs.

## Is it whole?

```bash
distill deploy verify .
```

## On any machine

The reference executor of distill runs the package without Core ML:

```bash
distill ask @PACKAGE@ "What can you do?" --max-new-tokens 32
```

## Python on macOS

Needs macOS 15, `coremltools` and `tokenizers`.

```python@PYTHON@```

## Swift

Needs iOS 18 or macOS 15. Prompt and answer are token ids: a tokenizer library turns text into ids by `tokenizer.json`,
after `chat_template.jinja` has laid out the conversation. This feeds the prompt token by token@CHUNKS@.
Written from Apple's documentation; it has not been compiled.

```swift@SWIFT@```
"""


def quickstart(manifest: Manifest, runtime: dict[str, Any]) -> str:
    """The page of a bundle."""
    name = runtime["decode_function"]
    decode = runtime["functions"][name]
    lengths = runtime["prefill"]["chunk_lengths"]
    prompt = f"{TURN_START}user\\nWhat can you do?{TURN_END}\\n{TURN_START}assistant\\n"
    longer = ", ".join(map(str, lengths))
    words = {
        "PYTHON": _PYTHON,
        "SWIFT": _SWIFT,
        "CHUNKS": f"; the other functions take {longer} at once on the same state" if lengths else "",
        "NAME": manifest.name,
        "PACKAGE": manifest.package,
        "PROMPT": prompt,
        "INPUT": decode["inputs"][0]["name"],
        "POSITION": decode["inputs"][1]["name"],
        "OUTPUT": decode["outputs"][0]["name"],
        "DECODE": name,
        "STOPS": ", ".join(map(str, runtime["tokenizer"]["stop_ids"])),
        "CONTEXT": str(runtime["context"]),
    }
    page = _PAGE
    for word, text in words.items():
        page = page.replace(f"@{word}@", text)
    return page
