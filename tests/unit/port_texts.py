"""Two hundred texts to tokenise: scripts, space, code, JSON, control tokens, numbers, odd characters."""
# ruff: noqa: RUF001

from __future__ import annotations

import random

_WORDS = [
    "The quick brown fox", "naïve café", "Straße", "Привет, мир", "你好，世界", "こんにちは", "안녕하세요", "שלום עולם",
    "مرحبا بالعالم", "नमस्ते दुनिया", "ไทย", "Ελληνικά", "Türkçe İıŞş", "👩‍👩‍👧‍👦 👍🏽", "🇩🇪", "ﬁligree",
    "ｆｕｌｌ", "½ ² Ⅷ",
    "don't I'll we've THEY'RE it'S", "O'Neil's", "1234567890", "3.14159e-10", "0xDEADBEEF", "२०२६", "12,345.67",
    "a_b-c.d/e\\f", "!?;:…—–", "«guillemets»", "“quotes”", "$€£¥", "#hash @at", "x=y+z*w", "C++", "e\u0301", "\u200b",
]  # fmt: skip
_SPACES = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u3000",
    "\n\n\n  ",
    "\t\t x",
    "    return",
]
_CODE = [
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # comment\n", "for (int i=0;i<10;++i){\n\tprintf(\"%d\\n\", i);\n}",
    "SELECT * FROM t WHERE a <> 'b';", "<div class=\"a\">&amp;</div>", "if [ -f x ]; then echo \"$y\"; fi",
    "```python\nprint('hi')\n```", "\\frac{a}{b}^2_{i}", "https://example.org/a?b=c&d=%20#e",
]  # fmt: skip
_JSON = [
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}', '{"a":[1,2,{"b":null}],"c":true}',
    '<tool_call>{"name": "add", "arguments": {"a": -1, "b": 2.5}}</tool_call>',
    '{"text": "line\\nline \\u00e9 \\"q\\""}',
    '{"type": "object", "properties": {"x": {"type": "string", "enum": ["a", "b"]}}, "required": ["x"]}',
]  # fmt: skip
_CONTROL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|endoftext|>", "a<|im_end|>b",
    "<|im_start|><|im_end|>", "<|im_start", "<|im_end|> <|im_end|>", "\n<|im_end|>\n", "<tool_call></tool_call>",
]  # fmt: skip


def texts() -> list[str]:
    """The same ones every time."""
    draw = random.Random(0)
    out = [*_WORDS, *_SPACES, *_CODE, *_JSON, *_CONTROL]
    everything = [*_WORDS, *_SPACES, *_CODE, *_JSON, *_CONTROL]
    while len(out) < 160:
        parts = draw.sample(everything, draw.randint(2, 5))
        out.append(draw.choice(_SPACES).join(parts))
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE80), (0x3040, 0x30FF), (0x4E00, 0x9FFF)]
    while len(out) < 200:
        low, high = draw.choice(ranges)
        out.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 40))))
    return [text for text in out if text]
