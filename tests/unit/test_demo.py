"""The demonstration, on a CPU: what it shows, and what it leaves behind."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_demo(tmp_path):
    shown = run("-m", "benchmarks.demo", folder=tmp_path)
    assert "The result is right" in shown and "def mask_mod" in shown
    assert "kv in [max(0, q_idx - window + 1), q_idx + 1)" in shown  # of explain
    results = tmp_path / "flexdecode-results"
    names = {path.name for path in results.iterdir()}
    assert names == {"matrix.json", "matrix.csv", "matrix.md", "explain.png", "my_mod.py"}
    assert all(f"flexdecode-results/{name}" in shown for name in names)
    assert not {word for word in ("seed", "prototype", "floor of") if word in shown}
    assert "Right." in run(results / "my_mod.py", folder=tmp_path)


def test_a_changed_mod_is_kept(tmp_path):
    script = tmp_path / "flexdecode-results" / "my_mod.py"
    script.parent.mkdir()
    script.write_text("# changed\n")
    assert "your own mods, from before: kept" in run("-m", "benchmarks.demo", folder=tmp_path)
    assert script.read_text() == "# changed\n"
