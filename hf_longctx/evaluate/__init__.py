"""Dense against patched, on the tasks people compare models with."""
