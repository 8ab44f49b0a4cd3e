"""``python -m hf_longctx``, which is how ``accelerate launch -m hf_longctx ...`` starts the commands."""

from .commands._app import main

if __name__ == "__main__":
    main()
