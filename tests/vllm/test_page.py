"""docs/vllm.md as its reader follows it."""

import importlib.util
import json
import re
from pathlib import Path

from tests.vllm.engine import check, run
from tests.vllm.test_models import PROMPTS

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"


def test_the_first_server(models, tmp_path, monkeypatch):
    """The file, the name of the factory and the line of the log."""
    from flexdecode.integrations.vllm import layers

    text = PAGE.read_text()
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (config,) = {*re.findall(r"--additional-config '(.*?)'", text)}
    log = re.search(r"```text\n(flexdecode: .*?)\n```", text)[1]
    (tmp_path / "my_mods.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr(layers._log, "info", lambda text, *parts: said.append(text % parts))
    answers = run(models("llama"), PROMPTS, additional_config=json.loads(config))
    assert log in said
    spec = importlib.util.spec_from_file_location("my_mods_of_the_page", tmp_path / "my_mods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check(models("llama"), answers, module.fade)
