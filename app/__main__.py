"""`python -m app` is the same as the `scanwire` command."""

from app.cli import main

# Worker processes load this file again, under another name.
if __name__ == "__main__":
    main()
