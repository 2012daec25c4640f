"""`python -m hkr_keras`, as `hkr_keras`."""

import sys

from hkr_keras.cli import main

if __name__ == "__main__":
    sys.exit(main())
