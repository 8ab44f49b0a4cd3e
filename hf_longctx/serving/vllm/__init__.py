"""A plugin of vLLM, as an experiment: heads of a role keep what it needs, in vLLM's own blocks. See ``docs/vllm.md``.

Nothing here imports Transformers, which vLLM pins to versions of its own. `roles`, `run` and `window` need no vLLM.
"""
