"""Speed and memory, side by side, on the machine it runs on."""
