"""Local teachers by their files: who they are, and one line for a file that is not what it claims to be."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.data.teacher.local import find_gguf, identity_of, load_tokenizer, load_white_box
from distill.data.teacher.spec import Spec
from distill.errors import InputError
from distill.tokenizer import toy_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
KEY = struct.pack("<Q", 17) + b"general.file_type" + struct.pack("<I", 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"not a model at all" * 100,
        HEAD,
        b"GGUF" + struct.pack("<IQQ", 77, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + b"x" * 64,
        HEAD + KEY,
        HEAD + KEY + struct.pack("<I", 999_999),
        HEAD + struct.pack("<Q", 2**62) + b"general",
        HEAD + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1),
        HEAD + struct.pack("<Q", 1) + b"a" + struct.pack("<II", 77, 1),
    ],
)
def test_a_damaged_gguf_file_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for read in (identity_of, load_tokenizer):
        with pytest.raises(InputError, match=r"model\.gguf") as caught:
            read(Spec("gguf", str(path)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["no_such_package", "/no/such/file.gguf", "json", "../x", ""])
def test_a_gguf_that_is_nowhere_is_said_to_be_nowhere(target: str) -> None:
    with pytest.raises(InputError, match="gguf:"):
        find_gguf(target)


def test_a_folder_is_known_by_all_its_weights(tmp_path: Path) -> None:
    spec = Spec("hf", str(tmp_path))
    assert identity_of(spec).weights_sha256 is None
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"one")
    one = identity_of(spec).weights_sha256
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"two")
    two = identity_of(spec).weights_sha256
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"TWO")
    assert len({one, two, identity_of(spec).weights_sha256}) == 3 and None not in (one, two)


def _rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_rewritten("config.json", lambda text: text.replace(b'"num_hidden_layers": 1', b'"num_hidden_layers": 3')),
         "18 weights are missing"),
        (_rewritten("config.json", lambda text: text.replace(b'"hidden_size": 32', b'"hidden_size": 64')), "mismatch"),
        (_rewritten("config.json", lambda text: text.replace(b'_heads": 2', b'_heads": 0')), "zero"),
        (_rewritten("config.json", lambda text: text[:20]), "JSON"),
        (_rewritten("model.safetensors", lambda data: data[:5000]), "not fully covered"),
        (_rewritten("model.safetensors", lambda data: b""), "header"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "model.safetensors"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_never_filled_with_random_weights(
    tmp_path: Path, spoil: Callable[[Path], object], named: str
) -> None:
    tokenizer = toy_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    assert load_white_box(Spec("hf", str(tmp_path))).tokenizer.sha256 == tokenizer.sha256
    spoil(tmp_path)
    with pytest.raises(InputError, match=named):
        load_white_box(Spec("hf", str(tmp_path)))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(toy_tokenizer().to_json())
    with pytest.raises(InputError, match="vocab_size 100 is smaller"):
        load_white_box(Spec("hf", str(tmp_path)))


@pytest.mark.parametrize("opens", ["distill.data.teacher.local", "distill.data.store.bench", "distill.data.mix"])
def test_libraries_of_a_local_teacher_draw_no_progress_bars(opens: str) -> None:
    code = (
        f"import {opens}\n"
        "from distill.data.teacher.local import teacher_extra as extra\n"
        "import torch; extra('gguf'), extra('transformers')\n"
        "from tqdm.auto import tqdm\n"
        "print(tqdm([1]).disable)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("True\n", "")
