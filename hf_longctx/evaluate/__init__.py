"""Dense against patched: how far the answers of one model part, and what that costs or saves."""
