"""``python -m microtome`` is the command line."""

from microtome.cli import main

if __name__ == "__main__":
    main()
