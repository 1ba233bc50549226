"""The wheel, installed somewhere else, holds all that it needs."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("setup.py", "settings.ini", "README.md", "LICENSE")
DEMO = ["compare", "dpo", "hs-none-inner", "--seeds", "1", "--steps", "2", "--batch-size", "4", "--eval-n", "8", "--device", "cpu", "--out", "out",
        "--no-tune-lr", "--no-frontier", "--no-coherence"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "Run Python outside the repository, with the wheel's package in front of the editable one."
    home = tmp_path_factory.mktemp("wheel")
    source, target, work = home / "source", home / "target", home / "work"
    shutil.copytree(ROOT / "reprpo", source / "reprpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES: shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", home, source], check=True, timeout=120)
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, *home.glob("*.whl")], check=True, timeout=120)
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(target), "REPRPO_CACHE": str(home / "cache")}

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout
    run.target, run.work = target, work
    return run


def test_it_is_the_installed_one(python):
    assert Path(python("-c", "import reprpo; print(reprpo.__file__)").strip()).is_relative_to(python.target)


def test_help(python):
    assert "usage: reprpo COMMAND" in python("-m", "reprpo", "--help")


def test_world_model_loads(python):
    out = python("-c", "from reprpo import load_model; model, tokenizer = load_model(); print(model.config.num_hidden_layers, len(tokenizer))")
    layers, words = map(int, out.split())
    assert layers >= 6 and words > 100


@pytest.mark.timeout(280)
def test_comparison_runs(python):
    python("-m", "reprpo", *DEMO)
    assert json.loads((python.work / "out" / "summary.json").read_text())
    assert (python.work / "out" / "report.html").exists()


def test_a_folder_of_its_name_hides_nothing(tmp_path):
    "A script, or Jupyter, beside the clone: there `reprpo` is also a folder that is no package."
    (tmp_path / "reprpo").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", "import reprpo; print(reprpo.__file__)"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()).parent.name == "reprpo", (done.stdout, done.stderr)
