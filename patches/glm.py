"""GLM-4 9B (THUDM/glm-4-9b-chat-hf)."""

from hf_longctx import Family

FAMILY = Family(model_type="glm")
