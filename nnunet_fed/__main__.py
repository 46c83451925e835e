"""``python -m nnunet_fed``."""

from nnunet_fed.cli import main

if __name__ == "__main__":
    main()
