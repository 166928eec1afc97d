"""The page on deployment: its C++ and JavaScript run the file that its Python has written, where tools are there.

Without a compiler or node, names and shapes in them are those of the file all the same. `ONNXRUNTIME_INCLUDE` names the
folder of onnxruntime's headers; `ONNXRUNTIME_NODE` the `node_modules` that has onnxruntime-node, in place of which node
is otherwise given a stand-in that checks what it is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.pages import ROOT, blocks

PAGE = ROOT / "docs" / "how-to" / "deploy.md"
INCLUDE = os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime")
MODULES = os.environ.get("ONNXRUNTIME_NODE")
# what the page's programs see of onnxruntime-node: a session of one file, one input and one output
STAND_IN = """
import { readFileSync } from "node:fs";
const known = JSON.parse(readFileSync("known.json"));
export class Tensor {
  constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
}
export const InferenceSession = {
  async create(path) {
    readFileSync(path);
    return {
      async run(feeds) {
        const [[name, value]] = Object.entries(feeds);
        if (name !== known.input || value.type !== "float32" || String(value.dims) !== String(known.shape))
          throw new Error(`${name} ${value.dims}`);
        if (value.data.some((number, i) => Math.abs(number - known.image[i]) > 1e-6)) throw new Error("other numbers");
        return { [known.output]: { data: Float32Array.from(known.logits) } };
      },
    };
  },
};
"""


def source(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the page's Python ran, and what its file has: names, an input, and what comes out."""
    folder = tmp_path_factory.mktemp("deployed")
    before = Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(PAGE):
            block.run(namespace)
    finally:
        os.chdir(before)
    session = onnxruntime.InferenceSession(str(folder / "classifier.onnx"))
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    image: np.ndarray[Any, Any] = namespace["image"]
    logits = session.run(None, {given.name: image})[0]
    return folder, {
        **{"input": given.name, "output": result.name, "shape": [*image.shape]},
        **{"image": image.ravel().tolist(), "logits": logits.ravel().tolist()},
    }


@pytest.mark.parametrize("language", ["cpp", "js"])
def test_a_program_names_the_file_and_what_it_has(language: str, written: tuple[Path, dict[str, Any]]) -> None:
    folder, known = written
    text = source(language)
    assert [name for name in re.findall(r"\"([\w.]+\.onnx)\"", text) if not (folder / name).exists()] == []
    assert re.search(r"\"classifier\.onnx\"", text)
    assert re.search(rf"\b{known['input']}\b", text)
    assert re.search(rf"\b{known['output']}\b", text)
    assert ", ".join(map(str, known["shape"])) in text


def test_the_javascript_reads_what_python_reads(written: tuple[Path, dict[str, Any]]) -> None:
    if not (node := shutil.which("node")):
        pytest.skip("node is not there")
    folder, known = written
    (folder / "classify.mjs").write_text(source("js"), encoding="utf-8")
    (folder / "known.json").write_text(json.dumps(known), encoding="utf-8")
    target = folder / "node_modules"
    if MODULES:
        target.symlink_to(MODULES)
    else:
        package = target / "onnxruntime-node"
        package.mkdir(parents=True)
        (package / "package.json").write_text('{"name": "onnxruntime-node", "type": "module", "main": "index.js"}')
        (package / "index.js").write_text(STAND_IN)
    printed = subprocess.run(
        [node, "classify.mjs"], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert printed.returncode == 0, printed.stderr
    np.testing.assert_allclose([float(line) for line in printed.stdout.split()], known["logits"], atol=1e-5)


def test_the_cpp_reads_what_python_reads(written: tuple[Path, dict[str, Any]]) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or not (Path(INCLUDE) / "onnxruntime_cxx_api.h").exists():
        pytest.skip("a compiler or onnxruntime's headers are not there")
    folder, known = written
    (folder / "classify.cpp").write_text(source("cpp"), encoding="utf-8")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-isystem", INCLUDE, "classify.cpp", "libonnxruntime.so.1"]
    built = subprocess.run(
        [*command, "-Wl,-rpath,.", "-o", "classify"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    printed = subprocess.check_output([folder / "classify"], cwd=folder, text=True, timeout=60)
    np.testing.assert_allclose([float(line) for line in printed.split()], known["logits"], rtol=1e-4, atol=1e-4)
