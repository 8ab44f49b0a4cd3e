"""Which cached tokens leave, by score: one file, one YAML word. `base` says what a score is."""
