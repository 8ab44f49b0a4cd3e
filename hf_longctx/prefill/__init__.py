"""Which keys a query block reads in the prefill: one file and one YAML word per pattern."""
