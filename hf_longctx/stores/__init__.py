"""What a head keeps: one file and one YAML word per KV store."""
