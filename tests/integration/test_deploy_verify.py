"""`distill deploy verify`: bundles taken apart and altered, honestly and by forgers, and manifests from strangers."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coremltools.proto import Model_pb2

from distill import cli, config
from distill.artifacts import canonical_json, sha256_file
from distill.convert.package import CONTRACT_KEY, SPEC_FILE, WEIGHT_FILE
from distill.deploy import bundle as build
from distill.deploy import verify
from distill.deploy.config import DeployConfig
from distill.deploy.manifest import MANIFEST, read_manifest
from distill.errors import InputError
from tests.integration.bundles import Made, edit_json, reseal, train

Change = Callable[[Path], Any]


@pytest.fixture
def altered(made: Made, tmp_path: Path) -> Path:
    return made.copy(tmp_path)


@pytest.fixture(scope="session")
def other(made: Made) -> Path:
    """The bundle of another student of the same shape."""
    folder = made.folder / "other"
    again = made._replace(checkpoint=train(folder, seed=1))
    build.run(config.load(again.config(folder), DeployConfig), allow_failed=True, say=lambda line: None)
    return folder / "out"


def failed(bundle: Path, pinned: str | None = None, *, all_gates: bool = False) -> set[str]:
    """Gates that did not pass; {"refused"} for a manifest that is not even read."""
    try:
        found = verify.run(bundle, pinned, all_gates=all_gates)
    except InputError as error:
        assert "\n" not in str(error)
        return {"refused"}
    wrong = {name for name, gate in found.gates.items() if gate.status not in ("pass", "skipped")}
    reached = {name for name in wrong if "not reached" not in str(found.gates[name].reason)}
    return reached


def test_a_whole_bundle_verifies_and_its_answer_is_pytorch_s(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "verify", str(made.bundle), "--manifest-sha256", made.manifest_sha256]) == 0
    out = capsys.readouterr().out
    assert f"manifest sha256: {made.manifest_sha256}" in out and "it writes: " in out
    assert out.splitlines()[-1] == f"{made.bundle}: {len(verify.GATES)} pass"
    item = json.loads((made.bundle / "toy.contract/evaluation.json").read_text())["items"][0]
    tokens = item["greedy"]["tokens"][: verify.SMOKE_TOKENS]
    tokenizer = verify.PackageRunner(made.package).tokenizer()
    assert verify.run(made.bundle).answer == tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])


@pytest.mark.slow
def test_all_gates_of_the_package_can_be_run_again(made: Made) -> None:
    found = verify.run(made.bundle, all_gates=True).gates
    recorded = json.loads((made.bundle / "reports/contracts.json").read_text())["gates"]
    assert {name for name in found if name.startswith("contracts: ")} == {f"contracts: {name}" for name in recorded}
    assert {gate.status for gate in found.values()} == {"pass", "skipped"}


# --- files ---------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILE_CHANGES: dict[str, Change] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name(path.name + "2")),
    "in other case": lambda path: path.rename(path.with_name(path.name.swapcase())),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "linked": lambda path: (path.rename(path.with_name(path.name + "2")), path.symlink_to(path.name + "2")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_every_file_altered_in_any_way_is_seen(made: Made, altered: Path, change: str) -> None:
    for name in [*read_manifest(made.bundle)[0].files]:
        path = altered / name
        FILE_CHANGES[change](path)
        assert failed(altered) == {"files"}, name
        shutil.rmtree(altered)
        shutil.copytree(made.bundle, altered)
    FILE_CHANGES[change](altered / MANIFEST)
    assert failed(altered, made.manifest_sha256) == {"refused"}


ADDITIONS: dict[str, Change] = {
    "a file": lambda folder: (folder / "notes.txt").write_text("hello"),
    "a hidden file": lambda folder: (folder / ".DS_Store").write_bytes(b"\0"),
    "a file in the package": lambda folder: (folder / "toy.mlpackage/Data/extra.bin").write_bytes(b"\0"),
    "an empty folder": lambda folder: (folder / "more").mkdir(),
    "a deep folder": lambda folder: (folder / "/".join("abcdefghijklmnop")).mkdir(parents=True),
    "a link out": lambda folder: (folder / "passwd").symlink_to("/etc/passwd"),
    "a linked folder": lambda folder: (folder / "up").symlink_to(folder.parent),
    "a loop of links": lambda folder: (folder / "self").symlink_to(folder),
    "a dangling link": lambda folder: (folder / "gone").symlink_to("nowhere"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a socket": lambda folder: _socket(folder),
    "a name that is no text": lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_text(""),
    "a name with an escape": lambda folder: (folder / "\x1b[2J").write_text(""),
}


def _socket(folder: Path) -> None:
    before = os.getcwd()
    os.chdir(folder)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    os.chdir(before)


@pytest.mark.parametrize("addition", ADDITIONS)
def test_whatever_is_added_is_seen_and_nothing_is_followed(altered: Path, addition: str) -> None:
    ADDITIONS[addition](altered)
    reason = verify.run(altered).gates["files"].reason
    assert failed(altered) == {"files"} and reason is not None and reason.isascii() and reason.isprintable()


def test_a_folder_of_very_many_files_is_given_up_early(altered: Path) -> None:
    for number in range(9000):
        (altered / f"f{number}").touch()
    assert failed(altered) == {"files"}


# --- forgers: the manifest agrees with the files again -------------------------------------------------


def swap_package(folder: Path, other: Path) -> None:
    for name in ("toy.mlpackage", "toy.contract"):
        shutil.rmtree(folder / name)
        shutil.copytree(other / name, folder / name)


def set_gate(folder: Path, **values: Any) -> None:
    edit_json(folder / MANIFEST, lambda m: m["gates"]["contracts"]["parity_fp16"].update(values))


FORGERIES: dict[str, tuple[Change, set[str]]] = {
    "weights": (lambda f: flip(f / "toy.mlpackage" / WEIGHT_FILE), {"weights_unaltered"}),
    "program": (lambda f: _edit_program(f), {"program_unaltered"}),
    "tokenizer beside": (lambda f: _other_tokenizer(f / "tokenizer.json"), {"facts"}),
    "tokenizer within": (lambda f: _other_tokenizer(f / "toy.contract/tokenizer.json"), {"sidecar_unaltered"}),
    "template beside": (lambda f: flip(f / "chat_template.jinja"), {"facts"}),
    "template within": (lambda f: flip(f / "toy.contract/chat_template.jinja"), {"sidecar_unaltered"}),
    "contract": (lambda f: edit_json(f / "toy.contract/contract.json", lambda c: c.update(fp16_gain=1.5)),
                 {"contract"}),
    "goldens": (lambda f: flip(f / "toy.contract/goldens.safetensors"), {"sidecar_unaltered"}),
    "evaluation": (lambda f: flip(f / "toy.contract/evaluation.json"), {"sidecar_unaltered", "smoke"}),
    "context": (lambda f: edit_json(f / "runtime_config.json", lambda r: r.update(context=4096)), {"runtime"}),
    "stop tokens": (lambda f: edit_json(f / "runtime_config.json", lambda r: r["tokenizer"].update(stop_ids=[7])),
                    {"runtime"}),
    "state": (lambda f: edit_json(f / "runtime_config.json", lambda r: r["state"]["shape"].reverse()), {"runtime"}),
    "input name": (lambda f: edit_json(
        f / "runtime_config.json", lambda r: r["functions"]["decode"]["inputs"][0].update(name="x")), {"runtime"}),
    "temperature": (lambda f: edit_json(f / "runtime_config.json", lambda r: r["sampling"].update(temperature=1.0)),
                    {"runtime"}),
    "an unknown key": (lambda f: edit_json(f / "runtime_config.json", lambda r: r.update(eos=2)), {"runtime"}),
    "the form of JSON": (lambda f: (f / "runtime_config.json").write_text(
        json.dumps(json.loads((f / "runtime_config.json").read_text()))), {"runtime"}),
    "a figure of the card": (lambda f: _replace(f / "MODEL_CARD.md", "| parameters | ", "| parameters | 1"), {"pages"}),
    "the quick start": (lambda f: _replace(f / "QUICKSTART.md", "distill deploy verify .", "true"), {"pages"}),
    "a gate": (lambda f: set_gate(f, status="skipped"), {"verdicts", "pages"}),
    "an observed value": (lambda f: set_gate(f, observed=0.001), {"verdicts", "pages"}),
    "a report": (lambda f: edit_json(
        f / "reports/contracts.json", lambda r: r["gates"]["parity_fp16"].update(observed=0.001)), {"verdicts"}),
    "a report away": (lambda f: (f / "reports/distribution.json").unlink(), {"verdicts"}),
    "a report's gates away": (lambda f: edit_json(f / "reports/distribution.json", lambda r: r.update(gates={})),
                              {"verdicts"}),
    "an override": (lambda f: edit_json(f / MANIFEST, lambda m: m.update(overridden=["contracts: x fail"])),
                    {"verdicts", "pages"}),
    "parameters": (lambda f: edit_json(f / MANIFEST, lambda m: m["student"].update(parameters=7)), {"facts", "pages"}),
    "the teacher": (lambda f: edit_json(f / MANIFEST, lambda m: m["teacher"].update(model="a better one")), {"pages"}),
    "a file that no build writes": (lambda f: (f / "install.sh").write_text("true\n"), {"files"}),
    "a file in the sidecar": (lambda f: (f / "toy.contract/more.json").write_text("{}"), {"files"}),
    "the licence": (lambda f: edit_json(f / MANIFEST, lambda m: m.update(licence="MIT")), {"pages"}),
}  # fmt: skip


def _edit_program(folder: Path) -> None:
    path = folder / "toy.mlpackage" / SPEC_FILE
    model = Model_pb2.Model.FromString(path.read_bytes())
    model.description.metadata.author = "somebody"
    path.write_bytes(model.SerializeToString(deterministic=True))


def _other_tokenizer(path: Path) -> None:
    data = json.loads(path.read_text())
    data["truncation"] = None
    data["model"]["merges"] = data["model"]["merges"][:-1]
    path.write_text(json.dumps(data))


def _replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("name", FORGERIES)
def test_what_the_manifest_was_made_to_agree_with_is_seen_by_what_it_contradicts(altered: Path, name: str) -> None:
    change, seen = FORGERIES[name]
    change(altered)
    reseal(altered)
    assert failed(altered) & seen, failed(altered)


def test_a_forgery_of_what_no_other_file_repeats_is_seen_by_the_pinned_digest_alone(made: Made, altered: Path) -> None:
    """The lineage stands in the manifest only."""
    edit_json(altered / MANIFEST, lambda m: m["lineage"][0].update(fingerprint="0" * 64))
    assert failed(altered) == set()
    assert failed(altered, made.manifest_sha256) == {"refused"}


@pytest.mark.slow
def test_another_student_s_package_is_not_this_manifest_s(altered: Path, other: Path) -> None:
    swap_package(altered, other)
    reseal(altered)
    assert "facts" in failed(altered)


@pytest.mark.slow
def test_another_student_s_whole_bundle_is_seen_by_the_pinned_digest_alone(made: Made, other: Path) -> None:
    """Who writes a bundle anew has a bundle: only whoever knows the digest of the first can tell."""
    assert failed(other) == set()
    assert failed(other, made.manifest_sha256) == {"refused"}


def seal_package(bundle: Path) -> None:
    """Make the contract, inside and beside, agree with the weights again, and the manifest with all of it."""
    package, path = bundle / "toy.mlpackage", bundle / "toy.contract/contract.json"
    weights = package / WEIGHT_FILE
    contract = json.loads(path.read_text())
    contract["file"].update(sha256=sha256_file(weights), bytes=weights.stat().st_size)
    path.write_text(json.dumps(contract))
    model = Model_pb2.Model.FromString((package / SPEC_FILE).read_bytes())
    model.description.metadata.userDefined[CONTRACT_KEY] = canonical_json(contract)
    (package / SPEC_FILE).write_bytes(model.SerializeToString(deterministic=True))
    reseal(bundle)


def test_weights_changed_with_every_sha256_are_seen_by_what_the_package_writes(altered: Path) -> None:
    weights = altered / "toy.mlpackage" / WEIGHT_FILE
    data = bytearray(weights.read_bytes())
    for at in range(64, len(data), 64):  # every second value's sign, where no record describes what follows
        if data[at : at + 4] != b"\xef\xbe\xad\xde":
            for byte in range(at + 1, at + 64, 4):
                data[byte] ^= 0x80
    weights.write_bytes(data)
    seal_package(altered)
    assert failed(altered) == {"smoke"}


@pytest.mark.slow
def test_a_small_change_of_weights_with_every_sha256_is_seen_by_all_gates(altered: Path) -> None:
    weights = altered / "toy.mlpackage" / WEIGHT_FILE
    data = bytearray(weights.read_bytes())
    at = len(data) // 4 * 2
    data[at] ^= 0xFF  # the low byte of one value
    weights.write_bytes(data)
    seal_package(altered)
    assert failed(altered) == set()
    assert "contracts: parity_exact" in failed(altered, all_gates=True)


# --- the manifest of a stranger ------------------------------------------------------------------------


def in_json(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda folder: edit_json(folder / MANIFEST, change)


def with_path(path: str) -> Change:
    file = {"sha256": "0" * 64, "bytes": 1}
    return in_json(lambda manifest: manifest["files"].update({path: file}))


def raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / MANIFEST).write_bytes(change((folder / MANIFEST).read_bytes()))


HOSTILE: dict[str, Change] = {
    "empty": raw(lambda data: b""),
    "a list": raw(lambda data: b"[]\n"),
    "null": raw(lambda data: b"null\n"),
    "not JSON": raw(lambda data: data[:-9]),
    "not UTF-8": raw(lambda data: data.replace(b'"toy"', b'"\xff"')),
    "a byte order mark": raw(lambda data: b"\xef\xbb\xbf" + data),
    "huge": raw(lambda data: data + b" " * (5 << 20)),
    "deep": raw(lambda data: b'{"lineage":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "deep within a value": in_json(lambda m: m["lineage"][0].update(x=_nested(300))),
    "a key twice": raw(lambda data: data.replace(b'"name": "toy"', b'"name": "x",\n  "name": "toy"')),
    "a key twice within": raw(lambda data: data.replace(b'"bytes": ', b'"bytes": 1,\n      "bytes": ', 1)),
    "escapes": raw(lambda data: data.replace(b'"name": "toy"', b'"name": "\\u0074oy"')),
    "spaces": raw(lambda data: data + b" "),
    "a comment": raw(lambda data: b"// hello\n" + data),
    "NaN": raw(lambda data: data.replace(b'"step": 64', b'"step": NaN').replace(b'"loss": ', b'"loss": NaN, "x": ')),
    "a very long number": raw(lambda data: data.replace(b'"step": ', b'"step": ' + b"9" * 10_000)),
    "no schema": in_json(lambda m: m.pop("schema")),
    "another schema": in_json(lambda m: m.update(schema="distill-deployment/2")),
    "no files": in_json(lambda m: m.update(files={})),
    "no student": in_json(lambda m: m.pop("student")),
    "an unknown key": in_json(lambda m: m.update(verified=True)),
    "files as a list": in_json(lambda m: m.update(files=["a"])),
    "a negative size": in_json(lambda m: m["files"]["tokenizer.json"].update(bytes=-1)),
    "a size as text": in_json(lambda m: m["files"]["tokenizer.json"].update(bytes="1")),
    "no sha256": in_json(lambda m: m["files"]["tokenizer.json"].pop("sha256")),
    "a short sha256": in_json(lambda m: m["files"]["tokenizer.json"].update(sha256="00")),
    "a sha256 with a newline": in_json(lambda m: m["files"]["tokenizer.json"].update(sha256="0" * 64 + "\n")),
    "a status that is none": in_json(lambda m: m["gates"]["contracts"]["contract"].update(status="passed")),
    "very many files": in_json(lambda m: m["files"].update(
        {f"f{i}": {"sha256": "0" * 64, "bytes": 0} for i in range(5000)})),
    "itself": with_path(MANIFEST),
    "an absolute path": with_path("/etc/passwd"),
    "dots": with_path("../outside"),
    "dots within": with_path("reports/../../outside"),
    "a dot": with_path("./tokenizer.json"),
    "two slashes": with_path("reports//x"),
    "a slash at the end": with_path("reports/"),
    "a backslash": with_path("reports\\x"),
    "a drive": with_path("C:x"),
    "a hidden name": with_path("reports/.x"),
    "a NUL": with_path("a\0b"),
    "a newline": with_path("a\nb"),
    "fullwidth dots": with_path("\uff0e\uff0e/x"),
    "right to left": with_path("a\u202etxt.exe"),
    "decomposed letters": with_path("e\u0301"),
    "a lone surrogate": with_path("\ud800"),
    "the other case": with_path("TOKENIZER.json"),
    "a very long name": with_path("a" * 5000),
    "very deep": with_path("/".join("a" * 50)),
    "a package elsewhere": in_json(lambda m: m.update(package="../x.mlpackage")),
    "a package that is none": in_json(lambda m: m.update(package="tokenizer.json")),
    "a link": lambda folder: ((folder / MANIFEST).rename(folder / "m"), (folder / MANIFEST).symlink_to("m")),
    "a pipe": lambda folder: ((folder / MANIFEST).unlink(), os.mkfifo(folder / MANIFEST)),
    "a folder": lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
    "missing": lambda folder: (folder / MANIFEST).unlink(),
}  # fmt: skip


def _nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_one_line(altered: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    HOSTILE[name](altered)
    code = cli.main(["deploy", "verify", str(altered)])
    said = capsys.readouterr()
    if name == "deep within a value":  # as good as any other value that nothing reads
        assert code == 0
        return
    assert code == 2 and said.out == "", said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) < 1000, said.err
    assert said.err.isascii() and said.err.rstrip().isprintable()


def test_a_random_byte_of_the_manifest_never_makes_a_traceback(altered: Path) -> None:
    whole, draw = (altered / MANIFEST).read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        (altered / MANIFEST).write_bytes(data)
        try:
            read_manifest(altered)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("argv", [
    ["deploy", "verify", "nowhere"], ["deploy", "verify", __file__], ["deploy", "verify", "DIR"],
    ["deploy", "verify", "BUNDLE", "--manifest-sha256", "0" * 64],
    ["deploy", "verify", "BUNDLE", "--manifest-sha256", "abc"],
    ["deploy", "verify", "BUNDLE", "--manifest-sha256", "A" * 64],
])  # fmt: skip
def test_bad_arguments_exit_2_with_one_line(
    made: Made, tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"DIR": str(tmp_path), "BUNDLE": str(made.bundle)}
    assert cli.main([words.get(word, word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
