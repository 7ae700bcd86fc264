"""Draws docs/images/explain.png from the example of docs/explain.md: `python docs/images/explain.py`."""

import re
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    page = (HERE.parent / "explain.md").read_text()
    example: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], example)
    example["found"].save_picture(HERE / "explain.png")
