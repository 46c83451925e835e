"""``python -m nnunet_fed``."""

if __name__ == "__main__":  # a process of a pool imports this module too, and needs nothing of it
    from nnunet_fed.cli.app import main

    main()
