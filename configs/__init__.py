"""One self-contained YAML per checkpoint, installed as ``hf_longctx.configs``."""
