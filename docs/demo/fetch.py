"""Puts onnxruntime-web beside the page: three files of its npm package, which must be the pinned one.

    python docs/demo/fetch.py [FOLDER]

needs npm. The files (14 MB) are not committed; without FOLDER they go into `ort` beside this script.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "1.30.0"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def fetch(folder: Path) -> None:
    """Download the package by npm, check it, and take the files out.

    Raises:
        SystemExit: npm is missing or fails, or the package is another one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is needed to download onnxruntime-web, and is not installed.")
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}"],
            cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
        packages = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(packages) != 1:
            raise SystemExit(f"npm could not download onnxruntime-web {VERSION}: {done.stderr.strip()}")
        found = hashlib.sha256(packages[0].read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"the package of onnxruntime-web {VERSION} has sha256 {found}; expected was {SHA256}.")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(packages[0]) as package:
            for name in FILES:
                member = package.extractfile(f"package/dist/{name}")
                if member is None:
                    raise SystemExit(f"the package of onnxruntime-web {VERSION} has no file {name}.")
                (folder / name).write_bytes(member.read())
                print(folder / name)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("ort"))
