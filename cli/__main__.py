"""`python -m cli` is `surgeon`."""

from cli import main

if __name__ == "__main__":
    main()
