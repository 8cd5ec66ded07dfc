"""`python -m saga.cli` is the program `saga`."""

from saga.cli import main

if __name__ == "__main__":
    main()
