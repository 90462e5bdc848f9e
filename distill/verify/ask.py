"""Ask a package: greedy decoding through the .mlpackage, tokens shown as they come.

distill ask MODEL.mlpackage "Will it rain?"
distill ask MODEL.mlpackage --file questions.txt --json answers.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from distill import chat
from distill.artifacts import read_text, write_json
from distill.errors import InputError, stage_main
from distill.verify.runner import PackageRunner


def answer(runner: PackageRunner, question: str, max_new_tokens: int) -> Iterator[str]:
    """The answer in pieces of text, as its tokens come."""
    tokenizer = runner.tokenizer()
    prompt = chat.encode(tokenizer, [chat.Message("user", question)], add_generation_prompt=True).ids
    ids: list[int] = []
    shown = ""
    for token in runner.generate(prompt, max_new_tokens, tokenizer.stop_ids):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes are still coming
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids)[len(shown) :]
    if rest:
        yield rest


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print the answer, or one a line of a file."""
    parser = argparse.ArgumentParser(prog="distill ask", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="X.mlpackage, with X.contract beside it")
    parser.add_argument("question", nargs="?", help="one question")
    parser.add_argument("--file", type=Path, help="a question a line instead")
    parser.add_argument("--json", type=Path, dest="out", help="also write the answers here")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    args = parser.parse_args(argv)
    if (args.question is None) == (args.file is None):
        raise InputError("ask: give one question, or --file with a question a line")
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    questions = [args.question] if args.file is None else _read_questions(args.file)
    runner = PackageRunner(args.model)
    answers = []
    for question in questions:
        if args.file is not None:
            print(f"{question}  ", end="")
        pieces = []
        for piece in answer(runner, question, args.max_new_tokens):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        if runner.stopped not in ("stop token", "length"):
            print(f"stopped: {runner.stopped}", file=sys.stderr)
        answers.append({"question": question, "answer": "".join(pieces)})
    if args.out is not None:
        write_json(args.out, answers)
    if not any(a["answer"] for a in answers):
        print("the package answered with no text", file=sys.stderr)
        return 1
    return 0


def _read_questions(path: Path) -> list[str]:
    questions = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions
