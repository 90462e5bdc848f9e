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
