"""The documents are true: their commands, flags, paths, links, quoted messages, tables and the tree."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from distill.cli import STAGES, load
from tests.conftest import Toy

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/README.md"]
PROMISED = ("README.md", "Makefile", "tests/README.md", "docs/LOCAL_DEVELOPMENT_WORKFLOW.md",
            "docs/PRODUCTION_DISTILLATION_WORKFLOW.md", "docs/TOY_TEST_STRATEGY.md")  # fmt: skip
MAKEFILE = (ROOT / "Makefile").read_text()
DOORS = {stage.door: name for name, stage in STAGES.items() if stage.door}
ELSEWHERE = {"brew", "export", "head", "jq", "source", "tensorboard", "wc"}
"""Commands that are not ours: what they do is not checked here."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """One simple command of a document."""

    document: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words).splitlines()[0]}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(document.read_text()) if found == language]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text())


def commands(document: Path) -> Iterator[Command]:
    """The simple commands of the bash blocks: continued lines and quoted newlines joined, cut at |, && and ;."""
    for body in blocks(document, "bash"):
        words: list[str] = []
        for word in [*statement_words(body), ";"]:
            if word in ("|", "&&", ";"):
                if words:
                    yield Command(name_of(document), words)
                words = []
            else:
                words.append(word)


def statement_words(body: str) -> Iterator[str]:
    kept = ""
    for line in body.splitlines():
        kept += line
        if kept.endswith("\\"):
            kept = kept[:-1]
            continue
        lexer = shlex.shlex(kept, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # an open quote: the command goes on
            kept += "\n"
            continue
        yield from words
        yield ";"
        kept = ""
    assert not kept, f"a command without end: {kept}"


COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
LIVE = [c for c in COMMANDS if c.words[0] not in ELSEWHERE]


def test_the_documents_that_others_link_to_exist() -> None:
    assert [path for path in PROMISED if not (ROOT / path).is_file()] == []
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", LIVE, ids=str)
def test_a_command_is_one_that_works(command: Command) -> None:
    program, *arguments = command.words
    for word in arguments:
        check_path(word)
    if program == "make":
        check_make(arguments)
    elif program in ("distill", ".venv/bin/distill"):
        check_flags("distill", arguments)
    elif program in ("python", "python3.11"):
        check_python(arguments)
    elif program == "torchrun":
        check_python(arguments[arguments.index("-m") :])
    elif program == "pytest":
        assert [a for a in arguments if a.startswith("tests")]
    elif program == "bash":
        subprocess.run(["bash", "-n", str(ROOT / arguments[0])], check=True)
    elif program == "pip":
        check_pip(arguments)
    else:
        pytest.fail(f"nobody checks the command {program!r}")


def check_path(word: str) -> None:
    """Files of the checkout that a command names are there; outputs are not looked for."""
    if word.startswith(("configs/", "scripts/", "tests/", "docs/", "distill/")):
        assert (ROOT / word).exists(), word


def check_make(arguments: list[str]) -> None:
    variables = [a.partition("=")[0] for a in arguments if "=" in a]
    targets = [a for a in arguments if "=" not in a]
    assert targets and all(is_target(target) for target in targets), targets
    assert all(f"$({variable})" in MAKEFILE for variable in variables), variables
    result = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, env=bare())
    assert result.returncode == 0, result.stderr


def bare() -> dict[str, str]:
    """Without an outer make's settings."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def is_target(name: str) -> bool:
    return re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE) is not None


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        ast.parse(arguments[1])
        return
    assert arguments[0] == "-m", arguments
    if arguments[1] != "venv":
        check_flags(arguments[1], arguments[2:])


def check_flags(module: str, arguments: list[str]) -> None:
    """The stage or door exists, and its help knows every flag."""
    if module == "distill":
        if arguments[0].startswith("-"):
            assert arguments[0] in ("--help", "--version")
            return
        stage, arguments = arguments[0], arguments[1:]
        assert stage in STAGES, stage
    else:
        assert module in DOORS, f"no door {module}"
        assert importlib.import_module(module).main is load(STAGES[DOORS[module]])
        stage = DOORS[module]
    flags = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[A-Za-z]", argument)}
    assert flags <= known_flags(stage), flags - known_flags(stage)


@functools.cache
def known_flags(stage: str) -> frozenset[str]:
    """What the help of a stage lists. A main that stops at --help has parsed its arguments."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stopped:
        load(STAGES[stage])(["--help"])
    assert stopped.value.code == 0
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text.getvalue()))


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        for group in re.findall(r"\[(.*?)\]", argument):
            assert set(group.split(",")) <= set(extras), group


# --- for real ------------------------------------------------------------------------------------------

CHEAP = (["python", "-m", "data.make_toy_kd"], ["python", "-m", "infra.version_gate"], ["distill", "--help"])


@pytest.mark.parametrize("command", [c for c in LIVE if any(c.words[: len(few)] == few for few in CHEAP)], ids=str)
def test_a_cheap_command_runs_for_real(command: Command, tmp_path: Path) -> None:
    words = [word.replace("/tmp/", f"{tmp_path}/") for word in command.words]
    words[:1] = [sys.executable, "-m", "distill"] if words[0] == "distill" else [sys.executable]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    if "--n" in words:
        lines = Path(words[words.index("--out") + 1]).read_text().splitlines()
        assert len(lines) == int(words[words.index("--n") + 1])


SNIPPETS = [
    pytest.param(code, id=f"{name_of(document)}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(
        [*blocks(document, "python"),
         *(c.words[2] for c in commands(document) if c.words[:2] == ["python", "-c"])]
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def outputs(toy: Toy) -> Path:
    """A folder where toy artefacts stand in for what the documents' targets write."""
    folder = toy.folder / "documents"
    for package, place in ((toy.prefill, "8-ball/model"), (toy.prefill_long, "worker/model"),
                           (toy.decode, "worker/decode")):  # fmt: skip
        shutil.copytree(package, folder / f"coreml/artifacts/{place}.mlpackage")
    shutil.copytree(toy.exported, folder / "models/student/exported")
    (folder / "models/student/checkpoints").mkdir()
    shutil.copy(toy.checkpoint, folder / "models/student/checkpoints/latest.pt")
    return folder


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_python_snippet_runs_where_the_targets_have_written(code: str, outputs: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=outputs, capture_output=True, text=True, timeout=120, env=env
    )
    assert result.returncode == 0, result.stderr


# --- what the prose says -------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_targets_paths_and_stages_in_the_prose_exist(document: Path) -> None:
    quoted = re.findall(r"`([^`\n]+)`", prose(document))
    for text in quoted:
        first, *rest = text.split()
        if first == "make" and rest:
            assert is_target(rest[0]), text
        elif first == "distill" and rest and rest[0] != "STAGE" and not rest[0].startswith("-"):
            assert rest[0] in STAGES, text
        elif re.match(r"(distill|configs|scripts|tests|docs)/[\w./-]+$", text):
            assert (ROOT / text).exists(), text


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


@functools.cache
def source() -> str:
    """The code of the package and the Makefile, with texts that are written in pieces joined."""
    files = [path.read_text() for path in sorted((ROOT / "distill").rglob("*.py"))]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(files))
    return joined.replace('"\n', "\n") + MAKEFILE


MESSAGES = [
    line
    for body in blocks(ROOT / "docs/LOCAL_DEVELOPMENT_WORKFLOW.md", "text")
    for line in body.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_that_the_code_gives(message: str) -> None:
    pieces = [piece.strip(" :") for piece in re.split(r"<[^>]*>|; ", message)]
    pieces = [piece for piece in pieces if len(piece) > 4]
    assert pieces
    assert [piece for piece in pieces if piece not in source()] == []


def table_rows(document: str, heading: str) -> list[str]:
    """First cells of the table whose first column is `heading`."""
    text = (ROOT / document).read_text()
    table = re.search(rf"^\| {heading} \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert table, heading
    return re.findall(r"^\| `([^`]+)`", table[0], re.MULTILINE)


def test_the_table_of_gates_is_that_of_the_verification() -> None:
    from distill.verify.contracts import GATES

    assert table_rows("docs/PRODUCTION_DISTILLATION_WORKFLOW.md", "gate") == list(GATES)


def test_the_table_of_rules_is_that_of_the_validation() -> None:
    from distill.data.validate import TABLE

    assert table_rows("docs/PRODUCTION_DISTILLATION_WORKFLOW.md", "rule") == list(TABLE)


def test_the_table_of_policies_is_that_of_the_executor() -> None:
    from distill.mil import policy

    assert table_rows("docs/executor.md", "policy") == list(policy._POLICIES)


def test_every_documented_target_is_in_the_readme() -> None:
    """Those that `make help` lists, but for help and setup themselves."""
    listed = set(re.findall(r"^([\w-]+):.*## ", MAKEFILE, re.MULTILINE)) - {"help", "setup"}
    assert {row.removeprefix("make ") for row in table_rows("README.md", "target")} == listed


def tree() -> dict[str, str]:
    """Path -> what the README's last block says of it."""
    out: dict[str, str] = {}
    folders: list[str] = []
    for line in blocks(ROOT / "README.md", "text")[-1].splitlines():
        entry, _, words = line.strip().partition(" ")
        folders[(len(line) - len(line.lstrip())) // 2 :] = [entry]
        out["".join(folders)] = words.strip()
    return out


def test_the_tree_is_the_package_two_levels_deep() -> None:
    found = {
        name_of(path) + "/" * path.is_dir()
        for pattern in ("*", "*/*")
        for path in (ROOT / "distill").glob(pattern)
        if "__pycache__" not in path.parts and path.name != "__init__.py"
    }
    listed = tree()
    assert {path for path in listed if path.startswith("distill/")} - {"distill/"} == found
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert [path for path, words in listed.items() if path != "distill/" and not 2 <= len(words.split()) <= 7] == []


def test_the_readme_opens_with_the_two_commands_and_ends_with_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.startswith("# distill\n\n```bash\nmake 8-ball\nmake test\n```\n")
    assert text.endswith("```\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_document_holds_an_emoji(document: Path) -> None:
    assert re.findall("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f]", document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_number_is_left_to_be_measured(document: Path) -> None:
    assert re.findall(r"<<TBD[^>]*>>", document.read_text()) == []
