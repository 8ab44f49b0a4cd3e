"""Which kept keys a decoded token reads: one file and one YAML word per selection."""
