"""Nothing from outside is run as code or fetched unasked: a look at every call of the source tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, python_files

SOURCES = [path for path in python_files() if path.relative_to(ROOT).parts[0] != "tests"]
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "dill.loads"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.full_load_all"),
    *("torch.hub.load", "torch.hub.list", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"),
    *(
        "urllib.request.urlopen",
        "urllib.request.urlretrieve",
        "requests.get",
    ),  # --data_path alone says what is fetched, by curl
    *("joblib.load", "pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
ALLOWED = {"data/layouts/remote.py": 1}  # calls: --data_path 'pipe:COMMAND' is a shell command, which the user types
EXTRACTS = {"extractall", "extract", "unpack_archive"}  # of tar and zip files: members are read, never unpacked


def dangers(source: str) -> Iterator[str]:
    """`LINE: CALL` of every call that could run what it reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what imports call things, in full
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, dot, rest = ast.unparse(call.func).partition(".")
        name = names.get(first, first) + dot + rest
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        opens_any = (
            name == "PIL.Image.open" and "formats" not in given
        )  # PostScript is a program; see data.decode.open_image
        is_archive = isinstance(call.func, ast.Attribute) and call.func.attr in EXTRACTS
        if (
            name in FORBIDDEN
            or is_archive
            or opens_any
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in {"numpy.load", "np.load"} and given.get("allow_pickle", "False") != "False")
            or given.get("shell", "False") != "False"
            or given.get("pretrained", "False") != "False"  # of timm and torchvision, which fetch weights then
        ):
            yield f"{call.lineno}: {ast.unparse(call)}"


def test_sources_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {
        "checkpoints/serialization.py",
        "config/loading.py",
        "data/layouts/tars.py",
        "models/base.py",
        "benchmarks/knn.py",
    } <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_from_outside_is_run(path: Path) -> None:
    found = list(dangers(path.read_text()))
    assert len(found) == ALLOWED.get(str(path.relative_to(ROOT)), 0), found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=flag)",
        "from torch import load as l; l(x)",
        "np.load(x, allow_pickle=True)",
        "import numpy; numpy.load(x, allow_pickle=a)",
        "import pickle as p; p.loads(x)",
        "from pickle import Unpickler; Unpickler(f).load()",
        "yaml.load(x)",
        "eval('1')",
        "exec(x)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "from torch import hub; hub.list(x)",
        "timm.create_model(x, pretrained=True)",
        "tarfile.open(x).extractall(y)",
        "archive.extract(m)",
        "from PIL import Image; Image.open(x)",
    ],
)
def test_the_look_sees(line: str) -> None:
    assert len(list(dangers(line))) >= 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(x, weights_only=True)",
        "np.load(x)",
        "model.eval()",
        "yaml.safe_load(x)",
        "pickle.dumps(x)",
        "re.compile(x)",
    ],
)
def test_the_look_lets_pass(line: str) -> None:
    assert list(dangers(line)) == []
