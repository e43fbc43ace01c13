"""A process trains with what it has imported: that has to be what the files say, or it is refused."""

import importlib
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import recipe

from sisa.errors import FootingError, UserError
from sisa.learners import source
from sisa.learners.models import build_model
from sisa.learners.source import code_version

FILES = {
    "held_pkg/__init__.py": "",
    "held_pkg/models.py": "from held_pkg.layers import make\nfrom . import around\n\n"
    "def build(shape, classes):\n    import held_late\n    return make(shape, classes, held_late.BIAS)\n",
    "held_pkg/layers.py": "import torch\nfrom held_pkg import around\n\n"
    "def make(shape, classes, bias):\n    return torch.nn.Linear(shape[0], classes, bias=bias)\n",
    "held_pkg/around.py": "from held_pkg import models\n",
    "held_late.py": "BIAS = False\n",
}
MINE = recipe(model={"factory": "held_pkg.models:build"})
IMPORTED_BEFORE = """
import sys
from pathlib import Path
import held_pkg.models
if sys.argv[1:]:
    path = Path(sys.argv[1])
    path.write_text(path.read_text() + "# other\\n")
sys.path.append("tests")
from test_learners_loaded import MINE
from sisa.learners.source import code_version
print(code_version(MINE))
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A user's package whose modules import each other, one of them late."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("held_")]:
        del sys.modules[name]


def edit(path, more="# other\n"):
    path.write_text(path.read_text() + more)


def build():
    return build_model(MINE, (6,), 3)


@pytest.mark.parametrize("name", FILES)
def test_what_was_edited_after_its_import_is_refused_until_it_is_as_before(package, name):
    before = code_version(MINE)
    build()
    edit(package / name)
    with pytest.raises(FootingError, match=r"model\.factory: the source of 'held_\S+' changed") as caught:
        code_version(MINE)
    assert "Restart Python" in caught.value.hint
    (package / name).write_text(FILES[name])
    assert code_version(MINE) == before


def test_a_file_that_nobody_imported_yet_may_change(package):
    before = code_version(MINE)
    edit(package / "held_late.py", "BIAS = True\n")
    assert code_version(MINE) != before
    assert build().bias is not None


def test_what_is_imported_by_a_function_is_what_was_counted(package):
    code_version(MINE)
    edit(package / "held_late.py", "BIAS = True\n")
    with pytest.raises(FootingError, match="'held_late' changed"):
        build()
    code_version(MINE)
    build()


def test_an_edit_between_the_import_and_the_count_is_noticed(package, monkeypatch):
    real = source.load

    def overtaken(module):
        found = real(module)
        edit(package / "held_pkg" / "layers.py")
        return found

    monkeypatch.setattr(source, "load", overtaken)
    with pytest.raises(FootingError, match=r"'held_pkg\.layers' changed"):
        code_version(MINE)


def test_one_module_imported_again_is_refused_while_another_holds_the_old_one(package):
    code_version(MINE)
    edit(package / "held_pkg" / "layers.py")
    importlib.reload(sys.modules["held_pkg.layers"])
    with pytest.raises(FootingError, match=r"'held_pkg\.layers' was imported again .* 'held_pkg\S*' may hold"):
        code_version(MINE)
    for name in ("held_pkg.around", "held_pkg.models"):
        importlib.reload(sys.modules[name])
    code_version(MINE)


def test_all_of_it_imported_anew_is_a_new_beginning(package):
    before = code_version(MINE)
    build()
    for name in FILES:
        edit(package / name)
    for name in [name for name in sys.modules if name.startswith("held_")]:
        del sys.modules[name]
    assert code_version(MINE) != before
    build()


@pytest.mark.parametrize("edited", [None, *FILES])
def test_what_was_imported_before_anybody_looked_is_judged_by_its_age(package, edited):
    command = [sys.executable, "-c", IMPORTED_BEFORE, *([] if edited is None else [str(package / edited)])]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(root)])}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if edited in {None, "held_late.py"}:
        assert done.stdout.strip() == code_version(MINE), done.stderr
    else:
        assert "changed since this process imported it" in done.stderr


def test_bytecode_in_a_cache_is_not_believed(package):
    """Its source is told from another one by the second of its change and its length only."""
    path = package / "held_late.py"
    os.utime(path, (1, 1))
    py_compile.compile(str(path))
    path.write_text("BIAS = 'yes'\n")
    os.utime(path, (1, 1))
    assert path.stat().st_size == len(FILES["held_late.py"])
    code_version(MINE)
    assert build().bias is not None


def test_a_loaded_file_that_is_gone_is_an_error_with_a_name(package):
    code_version(MINE)
    (package / "held_pkg" / "layers.py").unlink()
    with pytest.raises(UserError, match=r"the source of 'held_pkg\.layers' can't be read"):
        code_version(MINE)


def test_a_module_that_fails_when_it_is_imported_is_an_error_that_says_so(package):
    edit(package / "held_pkg" / "layers.py", "1 / 0\n")
    with pytest.raises(UserError, match=r"'held_pkg\.models' can't be imported: ZeroDivisionError"):
        code_version(MINE)
