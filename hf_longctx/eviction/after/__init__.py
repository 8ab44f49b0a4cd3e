"""What becomes of evicted tokens: one file, one YAML word. `base` says what such a rule is."""
