"""Every export format and precision for pruned networks: file sizes, and errors against a float64 copy.

Run: python benchmarks/export_formats.py [network ...]; it prints the table of docs/export-formats.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import names, prepare
from models import cnn

import fxprune
from fxprune.export import to_onnx, to_program, to_torchscript

# families of pytorchcv: name, size of the square image
CNNS = {
    "resnet20_cifar10": 32, "densenet40_k12_cifar10": 32, "mobilenet_wd4": 224, "mobilenetv2_wd4": 224,
    "shufflenetv2_wd2": 224, "squeezenet_v1_1": 224,
}  # fmt: skip
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Bert": {**_TINY, "intermediate_size": 64},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "use_cache": False},
    "Llama": {**_TINY, "intermediate_size": 64, "num_key_value_heads": 2, "use_cache": False},
    "ViT": {**_TINY, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
    "T5Encoder": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "ONNX": (".onnx", {}),
    "ONNX sparse": (".onnx", {"sparse": True}),
    "ONNX float16": (".onnx", {"precision": "float16"}),
    "ONNX int8, static": (".onnx", {"precision": "int8", "calibration": True}),
    "ONNX int8, dynamic": (".onnx", {"precision": "int8"}),
    ".pt2": (".pt2", {}),
    "TorchScript": (".pt", {}),
}


def build(name: str) -> tuple[torch.nn.Module, Callable[[int], dict[str, torch.Tensor]]]:
    """A network with random weights, and a source of its inputs by batch size."""
    torch.manual_seed(0)
    if name in CNNS:
        size = CNNS[name]
        return cnn(name).eval(), lambda n: {"x": torch.randn(n, 3, size, size)}
    import transformers

    kind = name.removesuffix("Encoder")
    config = getattr(transformers, f"{kind}Config")(**TRANSFORMERS[name])
    model = getattr(transformers, f"{name}Model")(config).eval()
    if name == "ViT":
        return model, lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)}
    return model, lambda n: {"input_ids": torch.randint(99, (n, 12))}


def prune(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    """Mask a quarter of the rows of each inner weight and 80 % of what is left, and finalize."""
    weights = [n for n, p in traced.named_parameters() if p.dim() > 1 and n.endswith("weight") and "embed" not in n]
    for name in weights[1:-1]:
        fxprune.prune.ln_structured(traced, name, amount=0.25, n=2, dim=0)
        fxprune.prune.l1_unstructured(traced, name, amount=0.8)
    if "train" in traced.modes:  # batch norm must learn what is left, else activations fade to zero
        with torch.no_grad():
            for _ in range(20):
                traced.train()(*(torch.randn_like(x) for x in traced.example_args))
    return fxprune.finalize(traced.eval())


def measure(name: str, folder: Path) -> list[tuple[str, int, float | None, float | None, str]]:
    """For each format: bytes, error, the reference's own error (relative to float64), and what was refused."""
    model, sample = build(name)
    args = tuple(sample(2).values()) if name in CNNS else ()
    modes = ("train", "eval") if args else ("eval",)
    final = prune(fxprune.trace(model, args, {} if args else sample(2), modes=modes))
    batches = [sample(4) for _ in range(4)]
    rows = []
    for label, (suffix, given) in FORMATS.items():
        options = given | ({"calibration": batches} if given.get("calibration") else {})
        path = folder / f"{name}{suffix}"
        try:
            if suffix == ".onnx":
                size = to_onnx(final, path, **options).size
            else:
                size = (to_program if suffix == ".pt2" else to_torchscript)(final, path).size
        except fxprune.FxpruneError as error:
            rows.append((label, 0, None, None, str(error).splitlines()[0]))
            continue
        found = fxprune.compare(final, path, inputs=batches)
        errors = [(r.error, r.reference_error) for r in found.rows if r.error is not None]
        worst, own = (max((e[i] or 0.0 for e in errors), default=None) for i in (0, 1))
        rows.append((label, size, worst, own, "" if found.ok else "beyond the tolerance on other batches"))
    return rows


def main() -> None:
    prepare()
    print("| network | format | bytes | error | torch | |\n|---|---|---|---|---|---|")
    for name in names([*CNNS, *TRANSFORMERS]):
        with tempfile.TemporaryDirectory() as folder:
            for label, size, error, own, note in measure(name, Path(folder)):
                cells = ["" if v is None else f"{v:.1e}" for v in (error, own)]
                print(f"| {name} | {label} | {size:,} | {' | '.join(cells)} | {note} |", flush=True)


if __name__ == "__main__":
    main()
