"""Models, functions and samples by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError
from fxprune.recipes import sources
from fxprune.recipes.inputs import call_of_texts
from fxprune.recipes.recipe import Data, Model
from fxprune.recipes.samples import samples
from tests.recipe_networks import images, network

MODEL = Model(source="tests.recipe_networks:network")


def test_a_factory_gives_its_model_with_weights_of_a_file(tmp_path: Path) -> None:
    other = network()
    nn.init.normal_(other[0].weight)
    safetensors.torch.save_model(other, str(tmp_path / "w.safetensors"))
    found = sources.model(MODEL.source, str(tmp_path / "w.safetensors"))
    assert torch.equal(found.get_parameter("0.weight"), other[0].weight)


def test_a_saved_module_is_a_model(tmp_path: Path) -> None:
    fxprune.save(fxprune.trace(network(), images(2), modes=["eval"]), tmp_path / "m.fxp")
    assert torch.equal(sources.model(str(tmp_path / "m.fxp"))(images(3)), network()(images(3)))


def test_a_folder_of_transformers_is_a_model_of_its_class(tmp_path: Path, transformers: Any) -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(6).view(1, 6)
    for source in (str(tmp_path), f"transformers:{tmp_path}"):
        found = sources.model(source).eval()
        assert type(found) is type(model)
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
        # values that lie elsewhere in memory, as those of a mapped file, are added up in another order
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nothing", "is no such model"),
        ("tests.recipe_networks:lacking", "has no attribute 'lacking'"),
        ("lacking_module:factory", "No module named"),
        ("tests.recipe_networks:text", "returns a str"),
        ("model.pt", "a pickle"),
        ("ultralytics:yolov8n.pt", "a pickle"),
        ("ultralytics:yolov8n", "NAME.yaml"),
        ("transformers:./nowhere", "'transformers:./nowhere' cannot be built by transformers: "),
    ],
)
def test_what_is_no_model_is_refused(transformers: Any, source: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        sources.model(source)


def test_an_error_of_the_factory_itself_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="no weights at hand"):
        sources.model("tests.recipe_networks:broken")


def test_weights_of_another_model_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = network().state_dict()
    del state["0.bias"]
    safetensors.torch.save_file(state | {"0.weight": torch.zeros(2), "more": torch.zeros(1)}, path)
    with pytest.raises(ArgumentError, match=r"it lacks 0.bias; it has besides more; it has in other shapes 0.weight"):
        sources.model(MODEL.source, str(path))
    with pytest.raises(ArgumentError, match=r"\.safetensors file is needed"):
        sources.model(MODEL.source, "weights.pt")


def test_samples_of_a_file_are_evenly_spaced_and_cut_into_batches(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.float32).reshape(100, 1)
    np.savez(tmp_path / "x.npz", array)
    found = samples(Data(source=str(tmp_path / "x.npz"), samples=50, batch=20), MODEL)
    assert [len(call.args[0]) for call in found.batches] == [20, 20, 10]
    assert torch.equal(torch.cat([call.args[0] for call in found.batches])[:, 0], torch.arange(0, 100, 2.0))


def test_tensors_with_names_are_given_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"ids": torch.ones(4, 3), "mask": torch.zeros(4, 3)}, path)
    found = samples(Data(source=str(path)), MODEL).batches
    assert found[0].args == ()
    assert set(found[0].kwargs) == {"ids", "mask"}


@pytest.mark.parametrize("shape", [[1, 8, 6], [3, 8, 6]])
def test_images_of_a_folder_are_resized_and_normalized(tmp_path: Path, shape: list[int]) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cats").mkdir()
    for i, name in enumerate(("a.png", "cats/b.jpg", "c.PNG")):
        image.new("RGB", (20, 10), (50 * i,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = Data(source=str(tmp_path), shape=shape, mean=[0.1], std=[2.0])
    batch = samples(data, MODEL).batches[0].args[0]
    assert batch.shape == (3, *shape)
    levels = sorted({round(float(value), 3) for value in batch.amax((1, 2, 3))})
    assert levels == [round((level / 255 - 0.1) / 2, 3) for level in (0, 50, 100)]


@pytest.mark.parametrize(
    ("said", "size", "mean"),
    [
        ({"size": {"height": 8, "width": 6}, "image_mean": [0.4, 0.5, 0.6]}, (8, 6), 0.5),
        ({"size": {"shortest_edge": 9}, "crop_size": {"height": 6, "width": 6}, "do_center_crop": True}, (6, 6), 0.5),
        ({"size": {"shortest_edge": 7}, "image_mean": [0.4, 0.5, 0.6], "do_normalize": False}, (7, 7), 0.0),
    ],
)
def test_a_folder_of_transformers_says_how_its_images_are_prepared(
    tmp_path: Path, said: dict[str, Any], size: tuple[int, int], mean: float
) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    for i in range(2):
        image.new("RGB", (20, 10), (51,) * 3).save(tmp_path / "images" / f"{i}.png")
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(means | said))
    found = samples(Data(source=str(tmp_path / "images")), Model(source=str(tmp_path))).batches[0].args[0]
    assert found.shape == (2, 3, *size)
    wanted = 0.2 if said.get("do_normalize") is False else (0.2 - mean) / 0.5
    assert found[:, 1].numpy() == pytest.approx(wanted, abs=1e-6)


def test_values_of_images_stay_from_0_to_1_for_ultralytics(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(2):
        image.new("RGB", (20, 10), (51,) * 3).save(tmp_path / f"{i}.png")
    found = samples(Data(source=str(tmp_path), shape=[3, 4, 4]), Model(source="ultralytics:yolov8n.yaml"))
    assert found.batches[0].args[0].numpy() == pytest.approx(0.2, abs=1e-6)


def test_lines_of_text_are_tokens_whose_padding_does_not_count(tmp_path: Path, transformers: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    rules = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "lines.txt").write_text("good film\n\nfilm\n")
    data = Data(source=str(tmp_path / "lines.txt"), tokenizer=str(tmp_path / "words"), length=4)
    found = samples(data, MODEL)
    call = found.batches[0]
    assert call.kwargs["input_ids"].tolist() == [[2, 3, 0, 0], [3, 0, 0, 0]]
    assert found.weight is not None
    assert found.weight(**call.kwargs).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere", "there is nothing of that name"),
        ("tests.recipe_networks:no_batches", "gives 0 samples"),
        ("tests.recipe_networks:lacking", "has no attribute"),
    ],
)
def test_what_gives_no_samples_is_refused(source: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        samples(Data(source=source), MODEL)


def test_files_of_unequal_counts_and_folders_without_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3), b=np.zeros(4))
    with pytest.raises(ArgumentError, match="holds a 3, b 4"):
        samples(Data(source=str(tmp_path / "x.npz")), MODEL)
    with pytest.raises(ArgumentError, match="shape=None"):
        samples(Data(source=str(tmp_path)), MODEL)
    with pytest.raises(ArgumentError, match="has no images"):
        samples(Data(source=str(tmp_path), shape=[3, 4, 4]), MODEL)


@pytest.mark.parametrize("name", ["none.npz", "none.safetensors", "text.npz", "text.safetensors", "objects.npz"])
def test_a_file_without_tensors_is_refused_by_name(tmp_path: Path, name: str) -> None:
    for text in ("text.npz", "text.safetensors"):
        (tmp_path / text).write_text("no tensors")
    np.savez(tmp_path / "objects.npz", np.array([None, "a"]))
    with pytest.raises(ArgumentError, match=f"{name}' was to hold tensors; it cannot be read: "):
        samples(Data(source=str(tmp_path / name)), MODEL)


def test_inputs_are_said_by_shape_or_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.ones((2, 3)))
    call = call_of_texts(["2x3", "mask=2x3:int64", str(tmp_path / "x.npz")])
    assert [tuple(arg.shape) for arg in call.args] == [(2, 3), (2, 3)]
    assert call.kwargs["mask"].dtype == torch.int64
    with pytest.raises(ArgumentError, match="input '2xa' cannot be used"):
        call_of_texts(["2xa"])
