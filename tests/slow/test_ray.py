"""The actor of docs/many_processes.md, in a real Ray, where Ray is installed; it is no dependency of anything here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.pages import ROOT, snippets

from hf_longctx.assets import embedded

pytestmark = pytest.mark.slow


def test_the_actors_answer_as_one_model_does(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    page = ROOT / "docs" / "many_processes.md"
    (actor,) = [one.text for one in snippets(page) if one.language == "python" and "import ray" in one.text]
    name = embedded("hf-longctx/tiny-llama")
    check = (
        "from transformers import AutoTokenizer\nfrom hf_longctx import AutoModelForCausalLM\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        "model = AutoModelForCausalLM.from_pretrained(name, longctx='auto')\n"
        "for at, answer in enumerate(answers):\n"
        "    ids = tokenizer(f'note {at}', return_tensors='pt')\n"
        "    said = model.generate(**ids, max_new_tokens=4)[0, ids.input_ids.shape[1] :]\n"
        "    assert answer == tokenizer.decode(said, skip_special_tokens=True) and len(answers) == 4\n"
        "print('all the same')\n"
    )
    script = tmp_path / "actors.py"
    script.write_text(f"name = {name!r}\n{actor}\n{check}", "utf-8")
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and "all the same" in done.stdout, done.stderr[-4000:]
