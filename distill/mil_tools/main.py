"""Look into Core ML packages, run them and find where two disagree, on any machine.

distill mil TOOL [X.mlpackage] [arguments]
"""

from __future__ import annotations

import difflib
import importlib
import sys

from distill.errors import InputError, stage_main

TOOLS = {
    "info": "what a package holds: interface, operators, weights, target",
    "run": "run a package once and describe its outputs",
    "ranges": "the range and the fp16 head-room of every value, over prompts",
    "diff": "run two packages on the same inputs, name the first operation that diverges",
    "bisect": "run a package against a PyTorch module, name the operations between them that diverge",
    "bench": "speed and memory of the executor beside PyTorch eager",
}


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Run one tool; without one, the list of them with their flags."""
    args = sys.argv[1:] if argv is None else argv
    if not args:
        print(usage())
        return 0
    if args[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    if args[0] not in TOOLS:
        near = difflib.get_close_matches(args[0], TOOLS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no tool {args[0]!r}{hint} (distill mil --help lists them)")
    module = importlib.import_module(f"distill.mil_tools.{args[0]}")
    parser = module.make_parser()
    code: int = module.run(parser.parse_args(args[1:]))
    return code


def usage() -> str:
    """The help page: every tool, then its flags."""
    width = max(map(len, TOOLS))
    rows = "\n".join(f"  {name:{width}s}  {text}" for name, text in TOOLS.items())
    flags = [importlib.import_module(f"distill.mil_tools.{name}").make_parser().format_usage() for name in TOOLS]
    codes = "Exit codes: 0 done, or equal; 1 different; 2 bad input."
    return f"{(__doc__ or '').strip()}\n\n{rows}\n\n{''.join(flags)}\n{codes}"
