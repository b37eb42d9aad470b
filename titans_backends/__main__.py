"""`python -m titans_backends` is `titans-backends`."""

from titans_backends.cli import main

if __name__ == "__main__":
    main()
