"""`python -m tools` is `tmem`."""

import sys

if __name__ == "__main__":
    try:
        from tools.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        # While modules were being loaded; nothing was started yet.
        sys.exit(130)
