"""``python -m nmsparse_ext``: the ``nmsparse`` command, for torchrun and the like."""

from nmsparse_ext.cli import main

if __name__ == "__main__":
    main()
