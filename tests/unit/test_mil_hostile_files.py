"""distill.mil: packages whose files lead astray. Each is refused with one PackageError, and nothing outside is read."""

from __future__ import annotations

import contextlib
import json
import os
import struct

import numpy as np
import pytest

from distill import mil
from distill.errors import PackageError
from tests.unit import mil_build as b


@pytest.mark.parametrize("name", ["weights/../../../../secret", "/etc/passwd", "..", "", "weights", "\0", "x" * 5000])
def test_a_weight_file_is_a_regular_file_of_the_package(tmp_path, name):
    (tmp_path / "secret").write_bytes(b.weight_bin(2, bytes(8)))
    model = b.raw_model()
    b.add_blob_const(model, "w", "fp32", (2,), 64).blobFileValue.fileName = "@model_path/" + name
    path = b.write_package(tmp_path / "m.mlpackage", model, b.weight_bin(2, bytes(8)))
    with pytest.raises(PackageError, match="weight file"):
        mil.load(path)


@pytest.mark.parametrize("file", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "weights"])
def test_a_pipe_is_not_waited_for(tmp_path, file):
    model = b.raw_model()
    b.add_blob_const(model, "w", "fp32", (2,), 64)
    path = b.write_package(tmp_path / "m.mlpackage", model, b.weight_bin(2, bytes(8)))
    target = path / ("Data/com.apple.CoreML/weights/weight.bin" if file == "weights" else file)
    target.unlink()
    os.mkfifo(target)
    with pytest.raises(PackageError, match="no such file"):
        mil.load(path)


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ", "loop"])
@pytest.mark.parametrize("file", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"])
def test_a_link_to_a_device_or_to_itself_is_refused(tmp_path, file, target):
    path = b.write_package(tmp_path / "m.mlpackage", b.raw_model())
    (path / file).unlink()
    (path / file).symlink_to((path / file).name if target == "loop" else target)
    with pytest.raises(PackageError, match="leads out of the package"):
        mil.load(path)


def test_a_folder_above_the_model_may_not_be_a_link_out(tmp_path):
    path = b.write_package(tmp_path / "m.mlpackage", b.raw_model())
    (path / "Data").rename(tmp_path / "elsewhere")
    (path / "Data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="leads out of the package"):
        mil.load(path)


@pytest.mark.parametrize(
    "manifest",
    [
        '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": ["x"]}}}',
        '{"rootModelIdentifier": ["a"], "itemInfoEntries": {}}',
        '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "\\u0000"}}}',
        '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "."}}}',
        '{"n": ' + "9" * 10_000 + "}",
        "\ufeff{}",
        "\x80",
        json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "x" * 10_000}}}),
    ],
)
def test_an_odd_manifest_is_refused_in_one_short_line(tmp_path, manifest):
    path = b.write_package(tmp_path / "m.mlpackage", b.raw_model())
    (path / "Manifest.json").write_bytes(manifest.encode("latin-1", "replace"))
    with pytest.raises(PackageError, match=r"Manifest\.json") as caught:
        mil.load(path)
    assert len(str(caught.value)) < 1000


def test_a_huge_sparse_model_file_is_not_read(tmp_path):
    path = b.write_package(tmp_path / "m.mlpackage", b.raw_model())
    os.truncate(path / "Data/com.apple.CoreML/model.mlmodel", 2**33)
    with pytest.raises(PackageError, match="bytes, the limit is"):
        mil.load(path)


def test_every_record_field_of_a_weight_file_may_be_spoilt(tmp_path):
    sound = b.weight_bin(2, bytes(8))
    model = b.raw_model()
    b.add_blob_const(model, "w", "fp32", (2,), 64)
    for at in (0, 4, 64, 68, 72, 80, 88):
        for value in (0, 1, 2**31, 2**32 - 1):
            spoilt = bytearray(sound)
            struct.pack_into("<I", spoilt, at, value)
            path = b.write_package(tmp_path / f"{at}-{value}.mlpackage", model, bytes(spoilt))
            with contextlib.suppress(PackageError):
                mil.load(path).predict({"x": np.ones(2)})


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 5000, "File name too long"), ("a\0b", "no such package"), ("\ud800", r"\\ud800: no such")],
)
def test_a_name_that_no_file_can_have_is_no_package(name, reason):
    with pytest.raises(PackageError, match=reason) as caught:
        mil.load(name)
    assert len(str(caught.value).encode()) < 200


@pytest.mark.parametrize("lengths", [(2, 3), (2,), ()])
def test_a_key_of_a_dictionary_is_one_number_or_string(tmp_path, lengths):
    model = b.raw_model()
    evil = b.operations(model)[0].attributes["evil"]
    evil.type.dictionaryType.keyType.tensorType.dataType = b._MIL["fp32"]
    pair = evil.immediateValue.dictionary.values.add()
    pair.key.type.listType.type.tensorType.dataType = b._MIL["fp32"]
    pair.key.immediateValue.list.SetInParent()
    for n in lengths:
        item = pair.key.immediateValue.list.values.add()
        b.set_type(item.type, "fp32", (n,))
        item.immediateValue.tensor.floats.values.extend([0.0] * n)
    b.set_type(pair.value.type, "fp32", (1,))
    pair.value.immediateValue.tensor.floats.values.append(1.0)
    path = b.write_package(tmp_path / "m.mlpackage", model)
    with pytest.raises(PackageError, match=r"evil: a key of type .* in a dictionary"):
        mil.load(path)
