"""``python -m nnunet_fed``."""

from nnunet_fed.cli.app import main

if __name__ == "__main__":
    main()
