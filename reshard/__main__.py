"""`python -m reshard`."""

from reshard.cli.main import main

if __name__ == "__main__":
    main()
