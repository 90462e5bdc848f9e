"""`distill deploy`: what it refuses, what it lets through and says so, and bundles that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from coremltools.proto import Model_pb2

from distill import checkpoint, cli, config, gates
from distill.artifacts import sha256_file
from distill.convert.package import SPEC_FILE, WEIGHT_FILE, save_placeholder
from distill.deploy import judge
from distill.deploy.bundle import require_bundle_or_nothing
from distill.deploy.config import DeployConfig
from distill.deploy.facts import placeless, teacher_facts
from distill.deploy.manifest import MANIFEST, read_manifest
from distill.errors import ConfigError, InputError
from tests.conftest import Toy
from tests.integration.bundles import LIMITS, Made, edit_json, tree
from tests.integration.test_full_disk import no_file_larger_than

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {65552: "float16", 131104: "int32"}


def deploy(made: Made, folder: Path, *flags: str, **keys: Any) -> int:
    """The stage on the package of the bundle that is there: building another would give the same."""
    return cli.main(["deploy", "--config", str(made.config(folder, **keys)), "--package", str(made.package), *flags])


def process(made: Made, folder: Path, *flags: str, seed: str = "0", **keys: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "distill", "deploy", "--config", str(made.config(folder, **keys)), *flags]
    env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- what a bundle says --------------------------------------------------------------------------------


def test_the_runtime_configuration_is_what_apple_s_own_protobuf_says_of_the_package(made: Made) -> None:
    runtime = json.loads((made.bundle / "runtime_config.json").read_text())
    model = Model_pb2.Model.FromString((made.package / SPEC_FILE).read_bytes())
    described = {f.name: f for f in model.description.functions}
    assert runtime["functions"].keys() == described.keys() and len(described) > 1
    for name, function in runtime["functions"].items():
        for kind in ("inputs", "outputs"):
            found = {
                f.name: (list(f.type.multiArrayType.shape), DTYPES[f.type.multiArrayType.dataType])
                for f in getattr(described[name], kind[:-1])
            }
            assert {t["name"]: (t["shape"], t["dtype"]) for t in function[kind]} == found
        (state,) = described[name].state
        shape = list(state.type.stateType.arrayType.shape)
        assert (runtime["state"]["name"], runtime["state"]["shape"]) == (state.name, shape)
    assert runtime["context"] == shape[2] and runtime["decode_function"] == model.description.defaultFunctionName
    assert runtime["prefill"]["chunk_lengths"] == [48]


def test_the_manifest_names_every_file_the_student_and_its_teacher(made: Made) -> None:
    manifest, digest = read_manifest(made.bundle)
    files = tree(made.bundle)
    assert digest == files.pop(MANIFEST) == made.manifest_sha256
    assert {path: file.sha256 for path, file in manifest.files.items()} == files
    assert all((made.bundle / path).stat().st_size == file.bytes for path, file in manifest.files.items())
    loaded = checkpoint.load(made.checkpoint)
    assert manifest.student.checkpoint_sha256 == sha256_file(made.checkpoint)
    assert manifest.student.parameters == sum(p.numel() for p in loaded.student.parameters())
    assert manifest.data == {
        "sha256": sha256_file(made.folder / "kd.jsonl"),
        "run_id": loaded.lineage[0]["data_run_id"],
    }
    assert manifest.teacher.model == "toy-tools" and manifest.teacher.source == "dataset header"
    assert manifest.lineage[0]["fingerprint"] == loaded.lineage[0]["fingerprint"]
    assert manifest.overridden == [] and manifest.date is None
    assert set(manifest.gates) == set(judge.REPORTS)


def test_every_figure_of_the_card_is_a_report_s(made: Made) -> None:
    card = (made.bundle / "MODEL_CARD.md").read_text()
    for name in judge.REPORTS:
        for gate, value in json.loads((made.bundle / f"reports/{name}.json").read_text())["gates"].items():
            (row,) = re.findall(rf"^\| {gate} \| (.*) \|$", card, re.MULTILINE)
            cells = row.split(" | ")
            assert cells[0] == value["status"]
            for cell, key in ((cells[1], "observed"), (cells[2], "threshold")):
                if isinstance(value.get(key), float):
                    assert float(cell) == pytest.approx(value[key], rel=1e-5)
    report = json.loads(made.checkpoint.with_name("toy.report.json").read_text())
    after = float(re.findall(r"held-out kl_div \| .* before, (.*) after", card)[0])
    assert after == pytest.approx(report["held_out"]["after"]["kl_div"], rel=1e-5)
    assert f"of it weights | {(made.package / WEIGHT_FILE).stat().st_size:,} bytes" in card
    assert "evaluation: not measured (no evaluation report)" in card and "core_ml: not measured" in card
    assert "speed, memory and placement on Apple hardware: not measured" in card
    assert "the teacher's licence | unknown" in card


def test_nothing_in_a_bundle_names_a_folder_of_the_machine(made: Made) -> None:
    for path in made.bundle.rglob("*"):
        if path.is_file():
            assert str(made.folder).encode() not in path.read_bytes(), path
    assert placeless({"a": ["/x/y", "models/y", 3], "b": {"c": "/"}}) == {"a": ["y", "models/y", 3], "b": {"c": ""}}


def test_a_teacher_is_that_of_the_dataset_that_was_learned_from_only(made: Made) -> None:
    loaded = checkpoint.load(made.checkpoint)
    other = loaded._replace(provenance=loaded.provenance | {"dataset": {"run_id": "another", "teacher": "its name"}})
    assert teacher_facts(other, made.folder / "kd.jsonl", None).model == "its name"
    none = loaded._replace(provenance={})
    found = teacher_facts(none, made.folder / "kd.jsonl", "Apache-2.0")
    assert (found.model, found.terms_url, found.stated_licence) == (None, None, "Apache-2.0")


def blocks(bundle: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (bundle / "QUICKSTART.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_quick_start_run(made: Made) -> None:
    """The Python for macOS runs with our executor in Core ML's place."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [line.replace("distill ", f"{sys.executable} -m distill ", 1)
                for body in blocks(made.bundle, "bash") for line in body.splitlines()]  # fmt: skip
    said = [
        subprocess.run(command, cwd=made.bundle, shell=True, env=env, capture_output=True, text=True, timeout=120)
        for command in commands
    ]
    assert [result.returncode for result in said] == [0, 0], [result.stderr for result in said]
    (code,) = blocks(made.bundle, "python")
    proxied = f"from distill.mil import coreml_proxy\ncoreml_proxy.install()\n{code}"
    result = subprocess.run([sys.executable, "-c", proxied], cwd=made.bundle, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == said[1].stdout != "\n"
    assert tree(made.bundle)[MANIFEST] == made.manifest_sha256 and not list(made.bundle.rglob("__pycache__"))


def test_the_swift_of_the_quick_start_names_what_the_package_has(made: Made) -> None:
    (code,) = blocks(made.bundle, "swift")
    runtime = json.loads((made.bundle / "runtime_config.json").read_text())
    for name in ("toy.mlpackage", "decode", "input_ids", "position", "logits"):
        assert f'"{name}"' in code
    assert f"[{', '.join(map(str, runtime['tokenizer']['stop_ids']))}]" in code
    assert f"position < {runtime['context']} " in code
    assert "has not been compiled" in (made.bundle / "QUICKSTART.md").read_text()


# --- what is refused -----------------------------------------------------------------------------------


def tight() -> dict[str, Any]:
    return LIMITS | {"rules": [LIMITS["rules"][0] | {"kl_mean": 0.0}]}  # type: ignore[index]


def test_a_failed_gate_is_refused_or_let_through_and_then_said_everywhere(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tight.yaml").write_text(yaml.safe_dump(tight()))
    keys = {"limits": str(tmp_path / "tight.yaml")}
    assert deploy(made, tmp_path, **keys) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "total_kl_mean fail" in said.err and "--allow-failed-gates" in said.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    assert deploy(made, tmp_path, "--allow-failed-gates", **keys) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "although 1 gates had not passed: distribution: total_kl_mean fail" in last
    manifest, _ = read_manifest(tmp_path / "out")
    assert len(manifest.overridden) == 1 and "total_kl_mean fail" in manifest.overridden[0]
    assert "## Built although gates did not pass" in (tmp_path / "out/MODEL_CARD.md").read_text()
    assert cli.main(["deploy", "verify", str(tmp_path / "out")]) == 0
    assert "although 1 gates had not passed" in capsys.readouterr().out.splitlines()[-1]
    edit_json(tmp_path / "out" / MANIFEST, lambda m: m.update(overridden=[]))
    assert cli.main(["deploy", "verify", str(tmp_path / "out")]) == 1


def report(**statuses: str) -> dict[str, gates.Gate]:
    return {name: gates.Gate(status) for name, status in statuses.items()}  # type: ignore[arg-type]


GOOD = {"contracts": report(contract="pass"), "distribution": report(kl="pass"),
        "evaluation": report(evaluation="skipped")}  # fmt: skip


@pytest.mark.parametrize(("change", "named"), [
    ({"contracts": report(contract="fail")}, "contracts: contract fail"),
    ({"contracts": report(contract="error")}, "contracts: contract error"),
    ({"contracts": report(contract="inconclusive")}, "contracts: contract inconclusive"),
    ({"contracts": report(greedy_decode="skipped")}, "contracts: greedy_decode skipped"),
    ({"contracts": {}}, "contracts: there is no such report"),
    ({"distribution": report(distribution="skipped")}, "distribution: distribution skipped"),
    ({"distribution": report(evaluation="skipped")}, "distribution: evaluation skipped"),
    ({"evaluation": report(tool_f1="fail")}, "evaluation: tool_f1 fail"),
    ({"evaluation": report(tool_f1="skipped")}, "evaluation: tool_f1 skipped"),
])  # fmt: skip
def test_only_what_passed_counts_but_for_named_skips(change: dict[str, Any], named: str) -> None:
    assert judge.unmet(GOOD) == []
    assert judge.unmet({**GOOD, "contracts": report(contract="pass", core_ml="skipped")}) == []
    assert judge.unmet(GOOD | change) == [named]
    assert judge.unmet({name: made for name, made in GOOD.items() if name not in change}) != []


def test_an_evaluation_counts_only_if_it_is_of_this_student(tmp_path: Path) -> None:
    path, own = tmp_path / "local.json", "a" * 64

    def verdict(**keys: Any) -> list[str]:
        path.write_text(json.dumps({"gates": {"tool_f1": {"status": "pass"}}} | keys))
        return judge.unmet(GOOD | {"evaluation": judge.gates_of(judge.evaluation(path, {own}), "x")})

    assert verdict(made_by={"inputs": {"checkpoint": {"sha256": own}}}) == []
    for inputs in ({"checkpoint": {"sha256": "b" * 64}}, {}, None, ["x"], {"checkpoint": own}):
        assert "stale" in verdict(made_by={"inputs": inputs})[0]
    assert "stale" in verdict()[0]
    own_gate = {"tool_f1": {"status": "pass"}, "fresh": {"status": "pass"}}
    assert "stale" in verdict(gates=own_gate)[0]
    skipped = {"evaluation": {"status": "skipped", "reason": "no evaluation report"}}
    assert verdict(gates=skipped, made_by={"inputs": {"checkpoint": {"sha256": own}}}) != []
    with pytest.raises(InputError, match="not a report"):
        verdict(score=float("nan"))
    for bad in ({}, {"tool_f1": "pass"}, {"tool_f1": {"status": "passed"}}, [], None):
        with pytest.raises(InputError, match="not a report"):
            verdict(gates=bad)
    path.write_text("[")
    with pytest.raises(InputError, match="not valid JSON"):
        judge.evaluation(path, {own})


def another(made: Made, folder: Path, change: Any) -> Path:
    """A checkpoint like the bundle's, with something changed."""
    loaded = checkpoint.load(made.checkpoint)
    change(loaded.student)
    return checkpoint.save(folder / "c.pt", loaded.student, loaded.tokenizer, step=1, loss=0.0, stage="toy",
                           lineage=loaded.lineage, provenance=loaded.provenance)  # fmt: skip


def test_a_package_of_another_checkpoint_is_refused_before_it_is_verified(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nudge(student: Any) -> None:
        student.model.norm.weight.data[0] += 1e-3

    assert deploy(made, tmp_path, checkpoint=str(another(made, tmp_path, nudge))) == 2
    said = capsys.readouterr()
    assert "was not made from this checkpoint" in said.err and "3/5" not in said.out and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def placeholder(made: Made, toy: Toy, folder: Path) -> Path:
    save_placeholder(folder / "toy.mlpackage", "no Core ML here")
    return folder / "toy.mlpackage"


def without_sidecar(made: Made, toy: Toy, folder: Path) -> Path:
    return Path(shutil.copytree(made.package, folder / "toy.mlpackage"))


def with_a_link(made: Made, toy: Toy, folder: Path) -> Path:
    shutil.copytree(made.package.with_suffix(".contract"), folder / "toy.contract")
    package = without_sidecar(made, toy, folder)
    (package / "Data/link").symlink_to("/etc/passwd")
    return package


def altered(made: Made, toy: Toy, folder: Path) -> Path:
    shutil.copytree(made.package.with_suffix(".contract"), folder / "toy.contract")
    package = without_sidecar(made, toy, folder)
    (folder / "toy.contract/tokenizer.json").write_text("{}")
    return package


@pytest.mark.parametrize(("package", "named"), [
    (placeholder, "placeholder"), (without_sidecar, "toy.contract: missing"), (with_a_link, "a symbolic link"),
    (altered, "altered"), (lambda made, toy, folder: toy.decode, "is called decode in its contract"),
    (lambda made, toy, folder: folder / "none.mlpackage", "no such package"),
])  # fmt: skip
def test_a_package_that_cannot_be_bundled_is_one_line(
    made: Made, toy: Toy, tmp_path: Path, package: Any, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").mkdir()
    given = package(made, toy, tmp_path / "given")
    argv = ["deploy", "--config", str(made.config(tmp_path)), "--package", str(given), "--allow-failed-gates"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_package_of_one_function_is_refused(made: Made, toy: Toy, tmp_path: Path) -> None:
    settings = made.config(tmp_path, name="decode", checkpoint=str(toy.checkpoint))
    assert cli.main(["deploy", "--config", str(settings), "--package", str(toy.decode), "--allow-failed-gates"]) == 2


@pytest.mark.parametrize(("keys", "named"), [
    ({"checkpiont": "x"}, "the nearest key is 'checkpoint'"), ({"name": "a/b"}, "name"), ({"name": "-x"}, "name"),
    ({"sampling": {"temperature": -1}}, "temperature"), ({"sampling": {"top_p": 0}}, "top_p"),
    ({"limits": "nowhere.yaml"}, "nowhere.yaml"), ({"checkpoint": "nowhere.pt"}, "nowhere.pt"),
])  # fmt: skip
def test_a_bad_configuration_is_one_line(
    made: Made, tmp_path: Path, keys: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(made, tmp_path, **keys) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_the_shipped_configuration_loads_and_states_no_licence() -> None:
    settings = config.load(ROOT / "configs/deploy.yaml", DeployConfig)
    assert settings == DeployConfig(), "the file shows the defaults"
    with pytest.raises(ConfigError):
        config.build({"sampling": {"temprature": 1}}, DeployConfig, "x")


# --- whole or not at all -------------------------------------------------------------------------------


def test_only_a_bundle_is_replaced_and_only_if_nobody_put_files_into_it(made: Made, tmp_path: Path) -> None:
    out = made.copy(tmp_path)
    require_bundle_or_nothing(out)
    require_bundle_or_nothing(tmp_path / "none")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'notes.txt', which is not the bundle's"):
        require_bundle_or_nothing(out)
    for name, make in {
        "file": lambda p: p.write_text("x"),
        "link": lambda p: p.symlink_to(made.bundle),
        "folder": lambda p: (p.mkdir(), (p / "x").write_text("x")),
        "model": lambda p: (p.mkdir(), (p / "config.json").write_text("{}")),
    }.items():
        make(tmp_path / name)
        with pytest.raises(InputError, match=f"cannot write .*{name}"):
            require_bundle_or_nothing(tmp_path / name)


def test_a_full_disk_leaves_the_bundle_that_was_there(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.bundle, tmp_path / "out")
    before = tree(tmp_path / "out")
    for size in (20_000, 400_000):
        with no_file_larger_than(size):
            assert deploy(made, tmp_path) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot write" in error
    assert tree(tmp_path / "out") == before and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
@pytest.mark.parametrize("line", ["2/5", "3/5", "5/5"])
def test_a_killed_build_leaves_the_bundle_that_was_there(made: Made, tmp_path: Path, line: str) -> None:
    shutil.copytree(made.bundle, tmp_path / "out")
    before = tree(tmp_path / "out")
    with process(made, tmp_path, "--package", str(made.package)) as child:
        assert child.stdout is not None
        assert next(said for said in child.stdout if said.startswith(line))
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and tree(tmp_path / "out") == before


@pytest.mark.slow
def test_two_builds_in_two_folders_and_processes_are_equal_byte_for_byte(made: Made, tmp_path: Path) -> None:
    """Everything is built again, and is the bundle that a third process built in a third folder."""
    folders = {seed: tmp_path / f"folder{seed}" for seed in ("1", "2")}
    for seed, folder in folders.items():
        folder.mkdir()
        with process(made, folder, seed=seed, evaluation="none.json") as child:
            _, error = child.communicate(timeout=300)
        assert child.returncode == 0, error
    first, second = (tree(folder / "out") for folder in folders.values())
    assert first == second and len(first) > 10
    ours = tree(made.bundle)
    assert {path for path in ours if ours[path] != first[path]} <= {MANIFEST}  # `evaluation` has another name in it


def test_a_date_comes_from_the_environment_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.deploy.bundle import _date

    assert _date() is None
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert _date() == "2023-11-14"
    for bad in ("yesterday", "9" * 30, ""):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", bad)
        with pytest.raises(InputError, match="SOURCE_DATE_EPOCH"):
            _date()
