"""VaultGemma 1B."""

from hf_longctx import Family

FAMILY = Family(model_type="vaultgemma", sliding="layer_types", scores={"softcap": "softcap"})
