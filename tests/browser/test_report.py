"""The report's page in a browser: it loads alone, opens by click and keyboard, and is accessible at every width."""

from __future__ import annotations

import importlib.util
import io
import random
from pathlib import Path
from typing import Any

import pytest

from fxprune import recipes
from fxprune.recipes.outcome import Outcome
from fxprune.recipes.page import page
from tests.browsers import SCHEMES, WIDTHS

HOSTILE = "<script>document.title='hurt'</script><img src=x onerror=\"document.title='hurt'\">&'\"</td></svg>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    tables: dict[str, Any] = {
        "model": {"source": "tests.recipe_networks:network"},
        "data": {"source": "tests.recipe_networks:batches"},
        "choose": {"macs": 0.5},
        "compare": {"rounds": 3, "score": "tests.recipe_networks:score"},
    }
    recipes.run(recipes.parsed(tables), folder)
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_inaccessible_or_sticks_out(report: str, opened: Any, width: int, scheme: str) -> None:
    watched = opened(report, width, scheme)
    for is_open in (False, True):
        watched.page.evaluate(
            f"document.querySelectorAll('details').forEach(each => each.open = {str(is_open).lower()})"
        )
        assert watched.violations() == []
        assert watched.sticks_out() <= 0


def test_it_loads_alone_and_says_nothing_to_the_console(report: str, opened: Any) -> None:
    watched = opened(report, bypass_csp=False)
    watched.page.wait_for_load_state("networkidle")
    assert (watched.complaints, watched.requests) == ([], [report])


def test_it_is_the_same_without_scripts(report: str, opened: Any) -> None:
    texts = [opened(report, java_script_enabled=on).page.locator("main").inner_text() for on in (True, False)]
    assert texts[0] == texts[1]


def test_a_click_opens_a_layer_and_shows_what_it_keeps(report: str, opened: Any) -> None:
    page = opened(report, bypass_csp=False).page
    layer = page.locator(".net li", has_text="conv2d").nth(1)
    kept = layer.locator(".kept").first
    assert not kept.is_visible()
    layer.locator("summary").click()
    assert kept.is_visible()
    assert kept.inner_text().startswith("axis 0: ")
    assert "before repair" in layer.inner_text()
    layer.get_by_role("link").first.click()
    assert page.url.endswith("#l1")


@pytest.mark.parametrize(("heading", "leads"), [("Sensitivity", "0.weight"), ("Repair", "3.weight")])
@pytest.mark.parametrize("scripts", [True, False])
def test_a_click_on_a_mark_of_a_chart_opens_its_layer(
    report: str, opened: Any, heading: str, leads: str, scripts: bool
) -> None:
    pytest.importorskip("vl_convert")
    page = opened(report, bypass_csp=False, java_script_enabled=scripts).page
    layer = page.locator(".net li").filter(has=page.locator(".told p", has_text=f"{leads}:"))
    assert not layer.locator(".told").is_visible()
    chart = page.locator(f"h2:text-is('{heading}') + figure")
    chart.locator(f"a:has([aria-label='{leads}'][aria-roledescription=point])").last.click()
    assert layer.locator(".told").is_visible()
    assert page.url.endswith(f"#{layer.locator('.told').get_attribute('id')}")


def test_a_click_on_a_budget_opens_its_line_of_the_table(report: str, opened: Any) -> None:
    pytest.importorskip("vl_convert")
    page = opened(report, bypass_csp=False).page
    point = page.locator("h2:text-is('Budget and loss') + figure a").last
    share = point.locator("path").get_attribute("aria-label")
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=share, exact=True))
    assert not row.is_visible()
    point.click()
    assert row.is_visible()


def test_layers_open_by_the_keyboard(report: str, opened: Any) -> None:
    page = opened(report, bypass_csp=False).page
    layer = page.locator(".net details").first
    for _ in range(20):
        page.keyboard.press("Tab")
        if layer.locator("summary").evaluate("each => each === document.activeElement"):
            break
    page.keyboard.press("Enter")
    assert layer.locator(".told").is_visible()
    page.keyboard.press("Enter")
    assert not layer.locator(".told").is_visible()


def layer(name: str, reads: list[int]) -> dict[str, Any]:
    return {"name": name, "kind": "conv2d", "reads": reads, "weights": [f"{name}.weight"]}


def outcome(layers: list[dict[str, Any]], **others: Any) -> Outcome:
    """What a report is made of, with a plan that halves every layer."""
    shapes = {name: [64, 3] for each in layers for name in each["weights"]}
    kept = {name: {"0": list(range(0, 64, 2))} for name in shapes}
    plan = {"kept": kept, "shapes": shapes, "stayed": []}
    stages: dict[str, dict[str, Any]] = {
        "trace": {"network": {"layers": layers, "shapes": shapes}, "seconds": 0.0},
        "finalize": {"plan": plan, "seconds": 0.0},
    }
    return Outcome({"model": {"source": "m:f"}} | others.pop("recipe", {}), {}, stages, **others)


def test_names_that_are_markup_stay_text(opened: Any, tmp_path: Path) -> None:
    layers = [{"name": HOSTILE, "kind": "input", "reads": [], "weights": []}, layer(HOSTILE, [0]), layer("b", [0, 1])]
    curve = {"name": HOSTILE, "kind": HOSTILE, "size": 4, "counts": [2, 4], "measured": [0.1, 0.5]}
    made = outcome(layers, recipe={"model": {"source": HOSTILE}}, failure=HOSTILE)
    made.stages["choose"] = {
        "seconds": 0.0,
        "sensitivity": {"curves": [curve]},
        "budgets": [{"macs": 0.5, "loss": 0.1, "chosen": True}],
        "channels": {"removed": {f"{HOSTILE}.weight (channel)": [1, 2]}, "stayed": {"b.weight (channel)": HOSTILE}},
    }
    reader = {"before": 0.5, "after": 0.1, "note": HOSTILE}
    made.stages["repair"] = {"repair": {"readers": {f"{HOSTILE}.weight": reader, "b": reader}}, "seconds": 0.0}
    made.stages["export"] = {"seconds": 0.0, "own_class": {"written": False, "why": HOSTILE}}
    profiles = [{"operators": {HOSTILE: {"nodes": 1, "ms": 1.0}}}] * 2
    made.stages["compare"] = {"operators": profiles, "seconds": 0.0}
    path = tmp_path / "report.html"
    path.write_text(page(made), encoding="utf-8")
    watched = opened(path.as_uri(), bypass_csp=True)  # without the policy, which would stop scripts
    assert watched.page.title() == f"{HOSTILE}: pruned by fxprune"
    assert watched.page.locator("script, img").count() == 0
    if importlib.util.find_spec("vl_convert"):
        assert watched.page.locator("figure").count() == 3
    assert watched.page.locator("h1").inner_text() == HOSTILE
    assert (watched.complaints, watched.requests) == ([], [path.as_uri()])


def test_ten_thousand_layers_load_and_open(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(
        page(outcome([layer(f"layers.{i}", [i - 1] if i else []) for i in range(10_000)])), encoding="utf-8"
    )
    assert path.stat().st_size < 6_000_000
    watched = opened(path.as_uri(), 390)
    assert watched.page.locator(".net > li").count() == 1000
    watched.page.get_by_text("All 10000 tensors that shrank").click()
    watched.page.get_by_text("layers.9999.weight").click()
    assert watched.sticks_out() <= 0
    assert watched.complaints == []


def test_what_is_wrong_is_found(opened: Any) -> None:
    watched = opened("data:text/html,<html><button></button><script>console.log('said')</script>")
    assert any(found.startswith("button-name") for found in watched.violations())
    assert watched.complaints == ["log: said"]


def test_a_page_of_a_hundred_wide_layers_is_small(tmp_path: Path) -> None:
    draw = random.Random(0)
    layers = [layer(f"features.stage{i // 10}.unit{i % 10}.body.conv.conv", [i - 1] if i else []) for i in range(100)]
    made = outcome(layers)
    plan = made.stages["finalize"]["plan"]
    wide = {each["weights"][0]: sorted(draw.sample(range(2048), 1024)) for each in layers}
    for name, kept in wide.items():
        for attached in ("weight", "bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
            tensor = name.replace("weight", attached)
            plan["shapes"][tensor], plan["kept"][tensor] = [2048, 512], {"0": kept}
    assert len(plan["kept"]) == 600
    assert len(page(made).encode()) < 2_000_000


def test_masks_are_drawn_as_the_rows_and_columns_that_are_kept(opened: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    made = outcome([{"name": "x", "kind": "input", "reads": [], "weights": []}, layer("a", [0])])
    rows, columns = [0, 1, 4, 6, 7], [1, 2, 5]
    made.stages["finalize"]["plan"] |= {
        "shapes": {"a.weight": [8, 6]}, "kept": {"a.weight": {"0": rows, "1": columns}}
    }  # fmt: skip
    path = tmp_path / "report.html"
    path.write_text(page(made), encoding="utf-8")
    shown = opened(path.as_uri()).page
    box = shown.locator("svg.mask").bounding_box()
    with image.open(io.BytesIO(shown.screenshot(full_page=True))) as picture:
        pixels = picture.convert("RGB")
    place = [
        [(box["x"] + box["width"] * (j + 0.5) / 6, box["y"] + box["height"] * (i + 0.5) / 8) for j in range(6)]
        for i in range(8)
    ]
    found = [[pixels.getpixel((round(x), round(y))) == (0, 114, 178) for x, y in line] for line in place]
    assert found == [[i in rows and j in columns for j in range(6)] for i in range(8)]
