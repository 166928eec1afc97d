"""What is shipped, under which names, and the rules of the source tree."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import grimp
import pytest

import fxprune

ROOT = Path(__file__).parents[1]
# Folder in the source tree -> the name it is imported by.
FOLDERS = {"fxprune": "fxprune", "passes": "fxprune.passes", "export": "fxprune.export"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(folder):
    """Python files of a real top-level folder, links not followed."""
    return sorted(
        Path(base, name)
        for base, _, names in os.walk(ROOT / folder, followlinks=False)
        for name in names
        if name.endswith(".py")
    )


def module_name(path):
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def imported(path, name=None):
    """Absolute names that a file imports; relative ones are resolved against `name`, the file's own module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and name is not None:
            parent = name.split(".")[: len(name.split(".")) - node.level + (path.name == "__init__.py")]
            yield from (".".join(filter(None, [*parent, node.module, alias.name])) for alias in node.names)


MODULES = {module_name(path): path for folder in FOLDERS for path in sources(folder)}


def within(name, package):
    return name == package or name.startswith(package + ".")


def test_folders_are_never_imported_by_their_bare_names():
    files = [path for folder in (*FOLDERS, "tests", "benchmarks") for path in sources(folder)]
    bare = FOLDERS.keys() - {"fxprune"}
    assert [f"{p.relative_to(ROOT)}: {n}" for p in files for n in imported(p) if n.split(".")[0] in bare] == []


def test_rooms_import_only_earlier_rooms_and_have_no_circle():
    """The contracts of pyproject.toml, which list the rooms; what each room imports is printed."""
    graph = grimp.build_graph("fxprune", cache_dir=None)
    rooms = sorted(graph.find_children("fxprune"))
    for room in rooms:
        graph.squash_module(room)
    for room in rooms:
        print(f"{room:20} imports {', '.join(sorted(graph.find_modules_directly_imported_by(room))) or 'nothing'}")
    found = subprocess.run(
        [Path(sysconfig.get_path("scripts"), "lint-imports"), "--no-cache", "--no-logo"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


def test_every_module_has_one_name():
    for name in ("fxprune.passes", "fxprune.export"):
        assert importlib.import_module(name).__name__ == name
    assert not {"passes", "export"} & sys.modules.keys()
    files = [os.path.realpath(m.__file__) for n, m in sys.modules.items() if within(n, "fxprune") and m.__file__]
    assert [file for file, count in Counter(files).items() if count > 1] == []


@pytest.mark.parametrize("folder", ["passes", "export"])
def test_links_are_relative(folder):
    assert os.readlink(ROOT / "fxprune" / folder) == f"../{folder}"


def test_every_package_is_declared():
    found = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found
    assert {path.parent for path in MODULES.values()} == {MODULES[name].parent for name in found}


def test_version_is_consistent():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", fxprune.__version__)
    assert importlib.metadata.version("fxprune") == fxprune.__version__


def test_the_citation_has_the_version_and_the_licence_of_the_project():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    fields = dict(re.findall(r"^(\w[\w-]*): (.+)$", citation, re.MULTILINE))
    assert fields["cff-version"] == "1.2.0"
    assert fields["version"] == fxprune.__version__
    assert fields["license"] == PROJECT["project"]["license"]
    assert re.findall(r"name: (.+)", citation) == [author["name"] for author in PROJECT["project"]["authors"]]


def test_issue_templates_are_forms():
    yaml = pytest.importorskip("yaml")
    forms = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
    assert [form.name for form in forms] == ["bug.yml", "config.yml", "idea.yml", "model.yml"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.name != "config.yml":
            assert {"name", "description", "body"} <= content.keys()
            fields = [field for field in content["body"] if field["type"] != "markdown"]
            assert len({field["id"] for field in fields}) == len(fields)
            assert all(field["attributes"]["label"] for field in fields)


def test_the_page_of_the_start_names_every_extra():
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)) == set(extras)


def test_the_changelog_is_ordered_by_category():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    known = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for release in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.+)$", release, re.MULTILINE)
        assert found == [name for name in known if name in found]


def test_changelog_has_an_unreleased_section():
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_no_file_is_longer_than_600_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lengths.items() if count > 600} == {}


def test_the_face_imports_neither_runtimes_nor_the_command_line_nor_what_draws_progress():
    later = {"onnxruntime", "onnxscript", "onnx", "typer", "rich"}
    script = f"import sys, fxprune, fxprune.progress; print(*sorted({later} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).split() == []


def test_every_requirement_is_pinned():
    project = PROJECT["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    wanted = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in wanted}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert wanted - {line.split("==")[0] for line in lines} == set()


def test_no_machine_paths():
    """Nothing in the tree names a place on the machine it was written on."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode or not listing.stdout:
        pytest.skip("not a git checkout")
    homes = re.compile(r"(?<![\w.])(?:/(?:home|root|tmp|work|Users)/|[A-Z]:\\Users)")
    # An environment made in the checkout lists its own paths; before Python 3.13 git does not pass it over.
    environments = {path.parent for path in ROOT.glob("*/pyvenv.cfg")}
    files = [ROOT / name for name in listing.stdout.split("\0") if ROOT / name.split("/")[0] not in environments]
    texts = {p: p.read_text(encoding="utf-8", errors="replace") for p in files if p.is_file() and not p.is_symlink()}
    hits = [f"{p.relative_to(ROOT)}: {m[0]}" for p, text in texts.items() for m in homes.finditer(text)]
    assert hits == []


# Builds and installs. They use the running environment's own setuptools and libraries, so nothing is downloaded.


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the source tree, so that a build leaves nothing in the real one."""
    target = tmp_path_factory.mktemp("checkout") / "fxprune"
    ignored = shutil.ignore_patterns(
        ".git", "__pycache__", "*_cache", "build", "dist", "*.egg-info", ".hypothesis", "*venv"
    )
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)
    return target


def build(kind, source, target):
    target.mkdir()
    script = f"import sys; from setuptools import build_meta as b; print('built', b.build_{kind}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", script, str(target)], cwd=source, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return target / run.stdout.splitlines()[-1].removeprefix("built ")


def expected_members():
    return Counter(
        [name.replace(".", "/") + ("/__init__" * (p.name == "__init__.py")) + ".py" for name, p in MODULES.items()]
    )


def check_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        members = Counter(archive.namelist())
        metadata = archive.read(next(n for n in members if n.endswith(".dist-info/METADATA"))).decode()
    code = Counter({name: count for name, count in members.items() if name.endswith(".py")})
    assert code == expected_members()
    rest = {name for name in members if not name.endswith(".py") and ".dist-info/" not in name}
    assert rest == {"fxprune/py.typed", "fxprune/recipes/report.html.jinja"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in members)
    assert f"Version: {fxprune.__version__}\n" in metadata


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_module_once(checkout, tmp_path):
    check_wheel(build("wheel", checkout, tmp_path / "direct"))
    with tarfile.open(build("sdist", checkout, tmp_path / "sdist")) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wanted = {"LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "constraints.txt", "tests"}
    assert wanted <= {path.name for path in unpacked.iterdir()}
    check_wheel(build("wheel", unpacked, tmp_path / "from_sdist"))


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
def test_install_works_from_elsewhere(checkout, tmp_path, editable):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    # A path in a .pth file lends the libraries, and not the fxprune that may be installed beside them in editable form.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
    ]
    subprocess.run([*pip, "--no-build-isolation", *["-e"] * editable, str(checkout)], check=True, cwd=tmp_path)
    script = (
        "import importlib.util, sys, fxprune\n"
        "names = sys.argv[1:]\n"
        "for name in names:\n"
        "    try: importlib.import_module(name)\n"
        "    except fxprune.FxpruneError as error: assert 'which is not installed' in str(error)  # of an extra\n"
        "    print(importlib.util.find_spec(name).origin)\n"
        "assert not {'passes', 'export'} & sys.modules.keys()\n"
    )
    files = subprocess.check_output([python, "-c", script, *MODULES], text=True, cwd=tmp_path).split()
    home = checkout if editable else site
    assert all(Path(file).is_relative_to(home) for file in files), files
    program = venv / "bin" / "fxprune"  # what `pipx run fxprune` starts
    assert "demo" in subprocess.check_output([program, "--help"], text=True, cwd=tmp_path)
    assert fxprune.__version__ in subprocess.check_output([program, "--version"], text=True, cwd=tmp_path)
    schema = subprocess.check_output([program, "schema"], text=True, cwd=tmp_path)
    assert json.loads(schema)["properties"].keys() >= {"model"}
